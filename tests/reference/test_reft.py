"""ReFT: the paper's formulas on the blocks' outputs, and at chosen positions, whatever the padding and the cache."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.core.method import Bag
from tests import tiny
from tests.laws.cases import BACKBONES, busy
from tests.reference.compare import TOLERANCE, by_path, moved, scores

METHODS = {"LoReFT": dt.LoReFT(rank=3), "NoReFT": dt.NoReFT(rank=3), "DiReFT": dt.DiReFT(rank=3)}


def edit(label, own, h):
    """Return the paper's edit of one hidden state h [d], written with loops over the rank."""
    new = h.clone()
    if label == "LoReFT":
        basis = []
        for row in own["R"]:  # Gram-Schmidt
            for before in basis:
                row = row - (row @ before) * before
            basis.append(row / row.norm())
        for i, r in enumerate(basis):
            new = new + r * (own["W"][i] @ h + own["b"][i] - r @ h)
        return new
    for i in range(3):
        difference = own["W2"][i] @ h if label == "NoReFT" else 0.0
        new = new + own["W2"][i] * (own["W1"][i] @ h + own["b"][i] - difference)
    return new


def edited(label, own, h, keep):
    """Return hidden states [batch, length, d] edited where keep [batch, length] says."""
    rows = [[edit(label, own, t) if k else t for t, k in zip(*row, strict=True)] for row in zip(h, keep, strict=True)]
    return torch.stack([torch.stack(row) for row in rows])


def change_blocks(name, model, leaves, label, keep):
    """Make the blocks of a model compute the formula by forward hooks."""
    for path, own in leaves.items():

        def hook(module, args, y, own=own):
            h = y[0] if isinstance(y, tuple) else y
            new = edited(label, own, h, keep)
            return (new, *y[1:]) if isinstance(y, tuple) else new

        model.get_submodule(path).register_forward_hook(hook)


@torch.no_grad()
@pytest.mark.parametrize("label", list(METHODS))
def test_every_position_of_every_block_is_edited(label):
    model, weights = moved("llama", METHODS[label])
    reference, leaves = BACKBONES["llama"](), by_path(model, weights)
    change_blocks("llama", reference, leaves, label, torch.ones(3, 7, dtype=torch.bool))
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), rtol=1e-4, atol=1e-4)
    assert weights.count == 3 * (2 * 3 * tiny.WIDTH + 3)


def chosen(mask, first, last):
    """Return which positions are among the first or last ones of each row."""
    keep = torch.zeros_like(mask, dtype=torch.bool)
    for row, marks in enumerate(mask.tolist()):
        text = [i for i, mark in enumerate(marks) if mark]
        for i in text[:first] + (text[-last:] if last else []):
            keep[row, i] = True
    return keep


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("name", "first", "last"), [("llama", 4, 0), ("bert", 2, 3), ("gpt2", 1, 0)])
def test_only_chosen_positions_are_edited(name, first, last, padding):
    model, weights = moved(name, dt.AtPositions(METHODS["LoReFT"], first=first, last=last))
    reference, given = BACKBONES[name](), tiny.batch(model, padding)
    change_blocks(name, reference, by_path(model, weights), "LoReFT", chosen(given["attention_mask"], first, last))
    mask = given["attention_mask"].bool()
    with dt.attach(model, weights):
        ours = model(**given).logits[mask]
    assert (ours - model(**given).logits[mask]).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference(**given).logits[mask], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_positions_hold_in_cached_generation(name, padding):
    model = BACKBONES[name]()
    given = tiny.batch(model, padding)
    given.pop("decoder_input_ids", None)
    usual = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    # the first 4: shorter than one row, longer than another, so that a generated token is edited there
    delta = dt.AtPositions(dt.LoReFT(rank=3), first=4)
    plain = model.generate(**given, **usual)
    with dt.attach(model, busy(dt.init(delta, model), size=0.3)):
        texts = [
            model.generate(**given, **usual, use_cache=cache, **more)
            for cache in (True, False)
            for more in ({}, {"num_beams": 2})
        ]
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(texts[1], texts[3])
    assert not torch.equal(texts[0], plain)


@torch.no_grad()
def test_an_encoder_and_a_decoder_count_for_themselves():
    model, weights = moved("t5", dt.AtPositions(dt.LoReFT(rank=3), first=2))
    given, reference = tiny.batch(model), BACKBONES["t5"]()
    leaves = by_path(model, weights)
    for stack, mask in (("encoder", given["attention_mask"]), ("decoder", torch.ones(3, 4))):
        own = {path: leaf for path, leaf in leaves.items() if path.startswith(stack)}
        change_blocks("t5", reference, own, "LoReFT", chosen(mask, 2, 0))
    with dt.attach(model, weights):
        torch.testing.assert_close(scores(model), scores(reference), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_soft_prompt_on_a_causal_stack_is_not_counted():
    model = BACKBONES["llama"]()
    given, mask = tiny.batch(model, "left"), tiny.batch(model, "left")["attention_mask"].bool()
    edits = busy(dt.init(dt.AtPositions(dt.LoReFT(rank=3), first=2), model), size=0.3)
    prompt = busy(dt.init(dt.PromptTuning(length=3), model))
    results = []
    for order in ((edits, prompt), (prompt, edits)):
        first, second = order
        with dt.attach(model, first), dt.attach(model, second):
            results.append(model(**given).logits[mask])
    torch.testing.assert_close(*results, **TOLERANCE)
    # written out: the prompt in front of each row, and edits at the rows' first two tokens
    tokens = next(iter(prompt.tensors.values()))
    words = torch.cat([tokens.expand(3, -1, -1), model.model.embed_tokens(given["input_ids"])], 1)
    longer = torch.cat([torch.ones(3, 3, dtype=torch.long), given["attention_mask"]], 1)
    positions = torch.cat([torch.arange(-3, 0).expand(3, -1), (given["attention_mask"].cumsum(1) - 1).clamp(min=0)], 1)
    keep = torch.cat([torch.zeros(3, 3, dtype=torch.bool), chosen(given["attention_mask"], 2, 0)], 1)
    reference = BACKBONES["llama"]()
    change_blocks("llama", reference, by_path(model, edits), "LoReFT", keep)
    expected = reference(inputs_embeds=words, attention_mask=longer, position_ids=positions).logits[:, 3:][mask]
    torch.testing.assert_close(results[0], expected, rtol=1e-4, atol=1e-4)


def test_checkpointed_inner_sites_find_their_positions():
    gradients = []
    for checkpointed in (False, True):
        model = BACKBONES["llama"]().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        delta = dt.AtPositions(dt.Adapter(size=3), first=2)
        attachment = dt.attach(model, busy(dt.init(delta, model)))
        scores(model).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in attachment.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_an_orthonormal_leaf_is_its_own_basis():
    start = dt.init(dt.LoReFT(rank=3), BACKBONES["llama"]())
    for R in (tensor for name, tensor in start.tensors.items() if name.endswith(".R")):
        torch.testing.assert_close(R @ R.T, torch.eye(3), rtol=0, atol=1e-6)
        again = dt.LoReFT(rank=3).unfold(Bag({"R": R})).R
        torch.testing.assert_close(again, R, rtol=0, atol=1e-6)


def test_what_has_no_position_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="nothing tells where the prompt ends"):
        dt.attach(BACKBONES["llama"](), dt.AtPositions(dt.LoReFT(), last=1))
    with pytest.raises(dt.DeltaTuneError, match="nothing tells where the prompt ends"):
        dt.attach(BACKBONES["t5"](), dt.AtPositions(dt.LoReFT(), last=1))
    dt.attach(BACKBONES["t5"](), dt.AtPositions(dt.LoReFT(), last=1).at("encoder.block"))
    with pytest.raises(dt.DeltaTuneError, match="one for each token of the text"):
        dt.attach(BACKBONES["llama"](), dt.AtPositions(dt.LoReFT(), first=1).at("head"))
    with pytest.raises(dt.DeltaTuneError, match="chooses no position"):
        dt.AtPositions(dt.LoReFT())
    with pytest.raises(dt.DeltaTuneError, match="which LoRA.. does not act on"):
        dt.AtPositions(dt.LoRA(), first=1)
    with pytest.raises(dt.DeltaTuneError, match=r"LoReFT\(rank=64\) exceeds the width 32"):
        dt.sites(BACKBONES["llama"](), dt.LoReFT(rank=64))
    model = BACKBONES["bert"]()
    dt.attach(model, dt.PromptTuning(length=2) + dt.AtPositions(dt.LoReFT(), first=1))
    with pytest.raises(dt.DeltaTuneError, match="soft prompt in the same rows"):
        scores(model)
