"""Laws of rows and batches: where the loss lies, what is cut, and in which order examples come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltatune.errors import DeltaTuneError
from deltatune.tasks import Prompt, task
from deltatune.tuning.encode import (
    IGNORED,
    PADDED,
    WINDOW,
    Codec,
    Row,
    batches,
    collate,
    epoch_order,
    pad_inputs,
    sizes_of,
    tokens_read,
)
from tests.tuning import backbones as tiny

PROMPT = Prompt("the film was very good answer :", "not good")


def words(codec: Codec, ids: tuple[int, ...]) -> list[str]:
    return codec.tokenizer.convert_ids_to_tokens(list(ids))


def scored(codec: Codec, row: Row) -> list[str]:
    return words(codec, tuple(label for label in row.labels if label != IGNORED))


def test_causal_row_scores_only_the_answer_and_the_end() -> None:
    codec = Codec(tiny.causal(), 32, 8)
    row = codec.row(PROMPT, PROMPT.target)
    assert words(codec, row.input) == ["<s>", *PROMPT.text.split(), "not", "good", "</s>"]
    assert scored(codec, row) == ["not", "good", "</s>"]
    assert row.labels[-3:] == row.input[-3:] and len(row.labels) == len(row.input)
    assert row.tokens == len(row.input)


def test_seq2seq_row_has_the_answer_in_its_labels() -> None:
    codec = Codec(tiny.seq2seq(), 32, 8)
    row = codec.row(PROMPT, PROMPT.target)
    assert words(codec, row.input) == [*PROMPT.text.split(), "</s>"]
    assert words(codec, row.labels) == ["not", "good", "</s>"]
    assert row.tokens == len(row.input) + 3


def test_masked_row_has_one_mask_a_token_and_scores_only_these() -> None:
    codec = Codec(tiny.masked(), 32, 8)
    text = "the film was {mask} ."
    row = codec.row(Prompt(text, "not good", text.index("{mask}")), "not good")
    assert words(codec, row.input) == ["<s>", "the", "film", "was", "<mask>", "<mask>", ".", "</s>"]
    assert row.labels == (IGNORED,) * 4 + codec.target("not good") + (IGNORED,) * 2
    assert scored(codec, row) == ["not", "good"]


def test_braces_in_an_example_are_not_a_slot() -> None:
    codec = Codec(tiny.masked(), 40, 8)
    text = "{mask} is the film {mask}"
    row = codec.row(Prompt(text, "good", text.rindex("{mask}")), "good")
    assert row.labels.index(codec.target("good")[0]) == len(row.input) - 2


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "masked"])
def test_a_long_prompt_loses_its_beginning_and_nothing_else(kind: str) -> None:
    codec = Codec(tiny.KINDS[kind](), 12, 4)
    text = "a " * 40 + "the answer :"
    row = codec.row(Prompt(text, "good"), "good")
    whole = codec.row(Prompt("the answer :", "good"), "good")
    assert scored(codec, row) == scored(codec, whole)
    assert len(row.input) <= 12 + (4 if kind == "causal" else 0)
    end = len(whole.input) - len(codec.front)
    assert row.input[-end:] == whole.input[-end:]
    assert row.input[: len(codec.front)] == codec.front


def test_a_long_answer_keeps_its_end_token() -> None:
    codec = Codec(tiny.causal(), 12, 4)
    assert words(codec, codec.target("a b c d e")) == ["a", "b", "c", "</s>"]
    assert words(codec, Codec(tiny.masked(), 12, 4).target("a b c d e")) == ["a", "b", "c", "d"]


def test_text_after_a_slot_is_kept_when_the_text_before_it_is_too_long() -> None:
    codec = Codec(tiny.masked(), 12, 4)
    text = "a " * 40 + "{mask} . ,"
    row = codec.row(Prompt(text, "good", text.index("{mask}")), "good")
    assert len(row.input) == 12
    assert words(codec, row.input)[-4:] == ["<mask>", ".", ",", "</s>"]


def test_prompt_and_answer_fit_into_the_positions_of_the_backbone() -> None:
    codec = Codec(tiny.positional(), 1000, 10)
    row = codec.row(Prompt("a " * 200, "good"), "good")
    assert len(row.input) == 128 - 10 + 2
    with pytest.raises(DeltaTuneError, match="max_target 124 leaves 4 of the backbone's 128 positions"):
        Codec(tiny.positional(), 1000, 124)


def test_training_pads_on_the_right_and_generation_on_the_left() -> None:
    batch = collate([Row((1, 2, 3), (IGNORED, 2, 3)), Row((4,), (4,))], pad=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    left = pad_inputs([(1, 2), (3,)], pad=9, left=True)
    assert left["input_ids"].tolist() == [[1, 2], [9, 3]] and left["attention_mask"].tolist() == [[1, 1], [0, 1]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=700), st.integers(1, 40), st.integers(0, 9), st.integers(0, 5)
)
def test_an_epoch_visits_every_example_once(sizes: list[int], batch: int, seed: int, epoch: int) -> None:
    groups = epoch_order(sizes, batch, seed, epoch)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    assert len(groups) == -(-len(sizes) // batch)
    assert sum(len(group) < batch for group in groups) <= 1
    assert groups == epoch_order(sizes, batch, seed, epoch)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 16), st.integers(0, 400))
def test_the_step_is_the_position_in_the_data(count: int, batch: int, start: int) -> None:
    sizes = list(range(count))
    from_zero, from_start = batches(sizes, batch, 3), batches(sizes, batch, 3, start)
    for _ in range(start):
        next(from_zero)
    assert [next(from_zero) for _ in range(5)] == [next(from_start) for _ in range(5)]


def test_order_depends_on_seed_and_epoch() -> None:
    sizes = [(17 * index) % 199 + 1 for index in range(640)]
    orders = [epoch_order(sizes, 16, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] and orders[0] != orders[2]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 700), st.integers(1, 40), st.integers(0, 9))
def test_padding_stays_within_its_bound_or_is_what_the_widest_window_leaves(
    least: int, spread: int, count: int, batch: int, seed: int
) -> None:
    sizes = [least + (17 * index) % spread for index in range(count)]
    own = tokens_read(epoch_order(sizes, batch, seed, 0), sizes)
    shuffled = np.random.default_rng([seed, 0]).permutation(count).tolist()
    sorted_widest: list[list[int]] = []
    for first in range(0, count, WINDOW * batch):
        part = sorted(shuffled[first : first + WINDOW * batch], key=lambda index: sizes[index])
        sorted_widest += [part[cut : cut + batch] for cut in range(0, len(part), batch)]
    assert own <= PADDED * sum(sizes) or own == tokens_read(sorted_widest, sizes)


def test_rows_of_about_one_length_are_not_sorted() -> None:
    """Sorting has a price in loss, so where it saves little the batches are those of rows of one length: random ones."""
    sizes = [100 + index % 12 for index in range(640)]
    alike, equal = (epoch_order(own, 8, 3, 1) for own in (sizes, [1] * 640))
    assert [set(batch) for batch in alike] == [set(batch) for batch in equal]
    unlike = epoch_order([1 + index % 200 for index in range(640)], 8, 3, 1)
    assert [set(batch) for batch in unlike] != [set(batch) for batch in equal]


@pytest.mark.parametrize("name", ["glue-sst2", "glue-rte"])
def test_batches_of_a_real_task_are_within_the_bound_where_random_ones_are_not(
    shared_data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTATUNE_DATA", str(shared_data))
    sizes = [len(example.input.split()) for example in task(name).split("train")]
    own, random = (tokens_read(epoch_order(by, 8, 0, 0), sizes) for by in (sizes, [1] * len(sizes)))
    assert own <= PADDED * sum(sizes) and random > 1.35 * sum(sizes)


def test_a_codec_names_a_missing_mask_token() -> None:
    backbone = tiny.masked()
    backbone.tokenizer.mask_token = None
    with pytest.raises(DeltaTuneError, match="mask token"):
        Codec(backbone, 32, 8)


@pytest.mark.parametrize("name", ["t5-seed", "stories260k", "babyllama-tok105"])
def test_real_tokenizers_read_prompt_and_answer_as_one_text(shared_models, name: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_models / name)
    config = AutoConfig.from_pretrained(shared_models / name)
    kind = "seq2seq" if name == "t5-seed" else "causal"
    model = type("Shell", (), {"config": config})()
    codec = Codec(tiny.TinyBackbone(name, model, tokenizer, kind), 64, 32)
    row = codec.row(Prompt("the film was good\nanswer:", "very fine"), "very fine")
    whole = tokenizer("the film was good\nanswer: very fine").input_ids
    assert list(row.input) == (
        [*whole, tokenizer.eos_token_id] if kind == "causal" else tokenizer("the film was good\nanswer:").input_ids
    )
    labels = [label for label in row.labels if label != IGNORED]
    assert tokenizer.decode(labels, skip_special_tokens=True).strip() == "very fine"
    assert labels[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("causal", [True, False])
def test_rows_whose_inputs_were_cut_are_not_sorted_by_their_labels(causal: bool) -> None:
    """128 tokens of input, labels of 1 to 4: by whole lengths, batches would hold one label each."""
    prompt, labels = (5,) * 128, [(7,) * (1 + index % 4) for index in range(64)]
    ignored = (IGNORED,) * len(prompt)
    rows = [Row(prompt + label, ignored + label) if causal else Row(prompt, label) for label in labels]
    mixed = [len({labels[index] for index in batch}) for batch in epoch_order(sizes_of(rows), 8, seed=0, epoch=0)]
    assert sizes_of(rows) == [128] * 64 and sum(mixed) / len(mixed) > 2.5
    texts = [Row(prompt, tuple(range(index + 1))) for index in range(8)]
    assert sizes_of(texts) == [row.tokens for row in texts], "answers that do not recur are texts"
