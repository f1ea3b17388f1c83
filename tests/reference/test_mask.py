"""Masking against the paper's formulas: the mask, its straight-through gradient, and its start."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import deltatune as dt
from tests import tiny
from tests.reference.compare import by_path, moved, scores


class Straight(torch.autograd.Function):
    """1[m > threshold], whose gradient is handed back as it is (Zhao et al., 2020, equation 4)."""

    @staticmethod
    def forward(ctx, m, threshold):
        return (m > threshold).float()

    @staticmethod
    def backward(ctx, g):
        return g, None


def test_every_masked_linear_computes_and_learns_what_the_paper_says():
    model, weights = moved("llama", dt.Masking(sparsity=0.3))
    reference, masks, calls = tiny.llama(), {}, []
    for path, leaves in by_path(model, weights).items():
        m = masks[path] = leaves["m"].clone().requires_grad_(True)
        module = reference.get_submodule(path)

        def forward(x, module=module, m=m):
            calls.append(m)
            return F.linear(x, module.weight * Straight.apply(m, 0.01), module.bias)

        module.forward = forward
    bare = scores(model)
    attachment = dt.attach(model, weights)
    ours, theirs = scores(model), scores(reference)
    assert len(calls) == len(masks) == 7 * 3
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for name, leaf in attachment.named_parameters():
        m = masks[name.removeprefix("0.").removesuffix(".m")]
        torch.testing.assert_close(leaf.grad, m.grad, rtol=1e-4, atol=1e-6)


def test_the_share_that_starts_masked_is_the_one_written_down():
    model = torch.nn.Sequential(torch.nn.Linear(300, 200))
    for sparsity in (0.05, 0.4):
        m = dt.init(dt.Masking(sparsity=sparsity).at("path:0"), model).tensors["0.0.m"]
        assert abs((m <= 0.01).float().mean() - sparsity) < 0.01
        assert m.min() >= -0.02 and m.max() <= 0.03 / sparsity - 0.02
    assert dt.sites(model, dt.Masking().at("path:0")).parameters == 300 * 200


@torch.no_grad()
def test_merging_writes_zeros():
    model, weights = moved("bert", dt.Masking(sparsity=0.3))
    for path, tensor in dt.merge(model, weights).items():
        before = model.get_parameter(path)
        m = by_path(model, weights)[path.removesuffix(".weight")]["m"]
        assert torch.equal(tensor == before, m > 0.01)
        assert torch.equal(tensor == 0, m <= 0.01)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match=r"sparsity=0\.0.*between 0 and 1"):
        dt.Masking(sparsity=0.0)
    with pytest.raises(dt.DeltaTuneError, match=r"scale=-0\.02, threshold=0\.01.*write a scale above -0\.01"):
        dt.Masking(scale=-0.02)
