"""Scoring and generating in padded batches equals doing it one by one without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltatune.errors import DeltaTuneError
from deltatune.tasks import Prompt
from deltatune.tuning import score as scoring
from deltatune.tuning.encode import IGNORED, Codec, Row
from deltatune.tuning.generate import generate
from deltatune.tuning.score import choose, score_candidates
from tests.tuning import backbones as tiny

TEXTS = ["the film was", "a", "the food is very very very good and not bad : the answer", "b c d", "one two three , ."]
CANDIDATES = [
    ["good", "not good", "very very bad"],
    ["bad", "fine"],
    ["a b c d", "e"],
    ["good"],
    ["two", "one", "three", "two"],
]


def questions(codec: Codec) -> list[list[Row]]:
    slot = " {mask} ." if codec.kind == "masked" else ""
    prompts = [Prompt(text + slot, "", len(text) + 1 if slot else None) for text in TEXTS]
    return [[codec.row(prompt, word) for word in words] for prompt, words in zip(prompts, CANDIDATES, strict=True)]


def one_by_one(backbone: Any, row: Row) -> float:
    """log p of a row's labels, written out token by token, without padding."""
    ids = torch.tensor([row.input])
    with torch.no_grad():
        if backbone.kind == "seq2seq":
            decoder = torch.tensor([(backbone.model.config.decoder_start_token_id, *row.labels[:-1])])
            logits = backbone.model(input_ids=ids, decoder_input_ids=decoder).logits[0]
        else:
            logits = backbone.model(input_ids=ids).logits[0]
    shift = 1 if backbone.kind == "causal" else 0
    total = 0.0
    for position, label in enumerate(row.labels):
        if label != IGNORED:
            total += float(torch.log_softmax(logits[position - shift].double(), -1)[label])
    return total


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_scores_equal_the_plain_computation(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny.KINDS[kind]()
    codec = Codec(backbone, 40, 8)
    asked = questions(codec)
    # A small budget splits the candidates of one group over several forward passes.
    monkeypatch.setattr(scoring, "LOGITS", 5 * 20 * tiny.SIZE)
    found = score_candidates(backbone, asked, batch, codec.pad)
    expected = [[one_by_one(backbone, row) for row in rows] for rows in asked]
    assert [len(row) for row in found] == [len(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, abs=2e-4)
    assert len({round(value, 3) for row in expected for value in row}) > 8, "the test needs scores that differ"


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_score_is_minus_the_loss_of_its_training_row(kind: str) -> None:
    from deltatune.tuning.encode import collate

    backbone = tiny.KINDS[kind]()
    codec = Codec(backbone, 40, 8)
    rows = [row for group in questions(codec) for row in group]
    scores = [value for group in score_candidates(backbone, questions(codec), 3, codec.pad) for value in group]
    with torch.no_grad():
        loss = float(backbone.model(**collate(rows, codec.pad)).loss)
    scored = sum(label != IGNORED for row in rows for label in row.labels)
    assert -sum(scores) / scored == pytest.approx(loss, abs=2e-4)


def test_the_first_of_equal_candidates_wins() -> None:
    assert choose([[-2.0, -1.0, -1.0], [-3.0], [-1.0, -1.0, -1.0], [-1.0, -0.5]]) == [1, 0, 0, 1]


@pytest.mark.parametrize("kind", ["causal", "positional", "seq2seq"])
def test_batched_generation_equals_one_at_a_time(kind: str) -> None:
    backbone = tiny.KINDS[kind]()
    codec = Codec(backbone, 40, 8)
    prompts = [codec.question(Prompt(text, "")) for text in TEXTS]
    together = generate(backbone, prompts, 6, batch=5, pad=codec.pad)
    alone = [generate(backbone, [prompt], 6, batch=1, pad=codec.pad)[0] for prompt in prompts]
    assert together == alone
    assert len(set(together)) > 1 and all(text == text.strip() for text in together)


def test_generation_is_greedy_and_leaves_the_prompt_out() -> None:
    backbone = tiny.causal()
    codec = Codec(backbone, 40, 8)
    prompt = codec.question(Prompt("the film was", ""))
    ids = list(prompt)
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(backbone.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = backbone.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    assert generate(backbone, [prompt], 4, 1, codec.pad) == [expected]


def test_a_masked_backbone_says_that_it_writes_no_text() -> None:
    with pytest.raises(DeltaTuneError, match="'tiny-masked' is masked and writes no text"):
        generate(tiny.masked(), [(1, 5, 2)], 4, 1, 0)
