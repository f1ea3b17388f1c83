"""Ladder side-tuning against its recurrence written out on the blocks' outputs, and its law: no gradient enters the backbone."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES, output
from tests.reference.compare import TOLERANCE, by_path, moved, scores


def recurrence(states, rungs):
    """Return the side state after all rungs, given the blocks' outputs."""
    s = torch.zeros(())
    for h, own in zip(states, rungs, strict=True):
        g = 1 / (1 + torch.exp(-own["alpha"] / 0.1))
        s = g * s + (1 - g) * (h @ own["D"].T + own["d"])
        normed = s / (s.square().mean(-1, keepdim=True) + torch.finfo(s.dtype).eps).sqrt()
        s = s + torch.relu(normed @ own["W1"].T + own["b1"]) @ own["W2"].T + own["b2"]
    return s


@torch.no_grad()
def test_a_ladder_beside_llama_equals_its_recurrence():
    model, weights = moved("llama", dt.LadderSideTuning(reduction=4))
    reference, rungs = BACKBONES["llama"](), list(by_path(model, weights).values())
    states = []

    def last(module, args, y):
        states.append(y)
        return y + recurrence(states, rungs) @ rungs[-1]["U"].T

    for block in reference.model.layers[:-1]:
        block.register_forward_hook(lambda m, args, y: states.append(y))
    reference.model.layers[-1].register_forward_hook(last)
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)


@pytest.mark.parametrize(("name", "where"), [("llama", "block"), ("bert", "block"), ("t5", "decoder.block")])
def test_no_gradient_enters_the_backbone(name, where):
    model, weights = moved(name, dt.LadderSideTuning().at(where))
    inside = []

    def watch(module, args, kwargs, y):
        inside.append((y[0] if isinstance(y, tuple) else y).requires_grad)

    for path, module in model.named_modules():
        if "dense" in path.lower() or path.endswith(("self_attn", "mlp", "SelfAttention")):
            module.register_forward_hook(watch, with_kwargs=True)
    attachment = dt.attach(model, weights)
    output(model).square().mean().backward()
    blocks, head = inside, [p.grad for p in attachment.parameters()]
    if name == "bert":  # the head behind the last block has a dense layer of its own, which does see the ladder
        blocks = inside[:-1]
    assert len(blocks) >= 4
    assert not any(blocks)
    assert all(g is not None and g.abs().sum() > 0 for g in head)


def test_counts_and_widths():
    d, m = tiny.WIDTH, tiny.WIDTH // 8
    table = dt.sites(BACKBONES["llama"](), dt.LadderSideTuning())
    assert table.parameters == 3 * (m * d + 8 * m * m + 6 * m + 1) + m * d
    both = dt.sites(BACKBONES["t5"](), dt.LadderSideTuning())
    assert both.parameters == 4 * (m * d + 8 * m * m + 6 * m + 1) + 2 * m * d  # one way up for each stack


def test_nonsense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="reduction=0"):
        dt.LadderSideTuning(reduction=0)
    with pytest.raises(dt.DeltaTuneError, match="temperature=0"):
        dt.LadderSideTuning(temperature=0.0)
    with pytest.raises(dt.DeltaTuneError, match="leaves nothing of the width 32.*at most 32"):
        dt.sites(BACKBONES["llama"](), dt.LadderSideTuning(reduction=64))
    with pytest.raises(dt.DeltaTuneError, match=r"include block\[-1\]"):
        dt.attach(BACKBONES["llama"](), dt.LadderSideTuning().at("block[:-1]"))
