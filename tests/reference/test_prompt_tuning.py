"""Prompt tuning against peft where positions agree, and against the prompt written into inputs_embeds elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES, busy, output
from tests.reference.compare import TOLERANCE, batch_of, copied, moved, scores

P = 4


def prompt(weights):
    (tensor,) = weights.tensors.values()
    assert tensor.shape == (P, tiny.WIDTH)
    return tensor


def peft_prompt(name, tensor):
    from peft import PromptTuningConfig, get_peft_model

    kind = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    config = PromptTuningConfig(task_type=kind, num_virtual_tokens=P, num_transformer_submodules=1)
    model = get_peft_model(BACKBONES[name](), config).eval()
    copied(model.prompt_encoder["default"].embedding.weight, tensor)
    return model


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_prompt_tuning_equals_peft_with_the_same_tensors(name):
    model, weights = moved(name, dt.PromptTuning(length=P))
    theirs, given = peft_prompt(name, prompt(weights)), batch_of(name)
    reference = theirs(**given).logits
    reference = reference.flatten(0, 1) if name == "t5" else reference[:, P:][given["attention_mask"].bool()]
    attachment = dt.attach(model, weights)
    ours = scores(model)
    torch.testing.assert_close(ours, reference, **TOLERANCE)
    ours.square().mean().backward()
    reference.square().mean().backward()
    (leaf,) = attachment.parameters()
    torch.testing.assert_close(leaf.grad, theirs.prompt_encoder["default"].embedding.weight.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_prompt_tuning_generates_what_peft_generates():
    model, weights = moved("llama", dt.PromptTuning(length=P))
    given = {k: v[:1] for k, v in batch_of("llama").items()}
    theirs = peft_prompt("llama", prompt(weights))
    usual = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with dt.attach(model, weights):
        assert torch.equal(model.generate(**given, **usual), theirs.generate(**given, **usual))


@torch.no_grad()
def test_on_learned_positions_the_prompt_shares_the_first_ones_with_the_text():
    model, weights = moved("gpt2", dt.PromptTuning(length=P))
    given, width = batch_of("gpt2"), 7
    words = model.transformer.wte(given["input_ids"])
    reference = model(
        inputs_embeds=torch.cat([prompt(weights).expand(3, -1, -1), words], 1),
        attention_mask=torch.cat([torch.ones(3, P, dtype=torch.long), given["attention_mask"]], 1),
        position_ids=torch.cat([torch.arange(P), torch.arange(width)])[None],
    ).logits[:, P:]
    with dt.attach(model, weights):
        torch.testing.assert_close(scores(model), reference[given["attention_mask"].bool()], **TOLERANCE)


@torch.no_grad()
def test_on_an_encoder_alone_the_prompt_stands_behind_the_first_token():
    model, weights = moved("bert", dt.PromptTuning(length=P))
    given, mask = batch_of("bert"), batch_of("bert")["attention_mask"]
    words = model.bert.embeddings.word_embeddings(given["input_ids"])
    longer = model(
        inputs_embeds=torch.cat([words[:, :1], prompt(weights).expand(3, -1, -1), words[:, 1:]], 1),
        attention_mask=torch.cat([mask[:, :1], torch.ones(3, P, dtype=torch.long), mask[:, 1:]], 1),
    ).logits
    reference = torch.cat([longer[:, :1], longer[:, 1 + P :]], 1)
    with dt.attach(model, weights):
        torch.testing.assert_close(scores(model), reference[mask.bool()], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_the_prompt_starts_as_rows_of_the_vocabulary(name):
    model = BACKBONES[name]()
    table = model.get_input_embeddings().weight
    start = prompt(dt.init(dt.PromptTuning(length=P), model))
    rows = (start[:, None] == table[None]).all(-1)
    assert rows.any(1).all()
    few = prompt(dt.init(dt.PromptTuning(length=P, init=dt.Vocabulary(most=2)), model))
    assert (few[:, None] == table[None, :2]).all(-1).any(1).all()


class Words:
    """A tokenizer of numbers: the piece of "7" is 7."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [int(word) for word in text.split()]}


@torch.no_grad()
def test_a_prompt_that_starts_from_a_text_repeats_its_embeddings():
    model = BACKBONES["llama"]()
    delta = dt.PromptTuning(length=P, init=dt.Text("9 30 9"))
    start = prompt(dt.init(delta, model, evidence={"tokenizer": Words()}))
    assert torch.equal(start, model.model.embed_tokens.weight[[9, 30, 9, 9]])
    longer = dt.PromptTuning(length=P, init=dt.Text("5 6 7 8 9 10"))
    start = prompt(dt.init(longer, model, evidence={"tokenizer": Words()}))
    assert torch.equal(start, model.model.embed_tokens.weight[[5, 6, 7, 8]])


def test_a_prompt_that_starts_from_a_text_needs_the_tokenizer_and_words():
    model = BACKBONES["llama"]()
    delta = dt.PromptTuning(length=P, init=dt.Text("9 30"))
    with pytest.raises(dt.DeltaTuneError, match=r"starts from \['tokenizer'\].*evidence=\{'tokenizer'"):
        dt.init(delta, model)
    with pytest.raises(dt.DeltaTuneError, match="evidence="):
        dt.attach(model, delta)
    assert "deltas" not in dict(model.named_children())
    with pytest.raises(dt.DeltaTuneError, match="makes no token of ' '"):
        dt.init(dt.PromptTuning(length=P, init=dt.Text(" ")), model, evidence={"tokenizer": Words()})


@torch.no_grad()
def test_of_two_prompts_on_an_encoder_the_one_written_last_stands_first():
    model, weights = moved("t5", dt.PromptTuning(length=P) + dt.PromptTuning(length=2))
    first, second = (tensor.expand(3, -1, -1) for tensor in weights.tensors.values())
    given = batch_of("t5")
    mask = torch.cat([torch.ones(3, 2 + P, dtype=torch.long), given["attention_mask"]], 1)
    words = model.shared(given["input_ids"])
    reference = model(
        inputs_embeds=torch.cat([second, first, words], 1),
        attention_mask=mask,
        decoder_input_ids=given["decoder_input_ids"],
    ).logits
    with dt.attach(model, weights):
        torch.testing.assert_close(output(model), reference, **TOLERANCE)


@torch.no_grad()
def test_two_prompts_on_an_encoder_alone_are_both_taken_out_again():
    model, weights = moved("bert", dt.PromptTuning(length=P) + dt.PromptTuning(length=2))
    first, second = (tensor.expand(3, -1, -1) for tensor in weights.tensors.values())
    given, mask = batch_of("bert"), batch_of("bert")["attention_mask"]
    words = model.bert.embeddings.word_embeddings(given["input_ids"])
    longer = model(
        inputs_embeds=torch.cat([words[:, :1], second, first, words[:, 1:]], 1),
        attention_mask=torch.cat([mask[:, :1], torch.ones(3, 2 + P, dtype=torch.long), mask[:, 1:]], 1),
    ).logits
    with dt.attach(model, weights):
        ours = output(model)
    torch.testing.assert_close(ours[mask.bool()], longer[:, [0, *range(3 + P, 9 + P)]][mask.bool()], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_backbone_with_a_prompt_is_copied_after_a_training_step(name):
    model = BACKBONES[name]()
    dt.attach(model, dt.PromptTuning(length=P))
    output(model).square().mean().backward()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(output(twin), output(model))


@torch.no_grad()
def test_positions_that_are_counted_from_the_padding_stay_so_with_a_prompt():
    model = tiny.roberta()
    given = tiny.batch(model, "left")
    with dt.attach(model, busy(dt.init(dt.PromptTuning(length=4), model))):
        scores = model(**given).logits
        for row, mask in enumerate(given["attention_mask"].bool()):
            alone = model(**{name: tensor[row : row + 1, mask] for name, tensor in given.items()}).logits[0]
            torch.testing.assert_close(scores[row][mask], alone, rtol=0, atol=1e-5)
