"""PEANuT against peft's PEANuT with the same tensors: outputs, gradients, merged weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from tests import tiny
from tests.laws.cases import busy
from tests.reference.compare import copied


def linear():
    return tiny.seeded(lambda: nn.Sequential(nn.Linear(24, 40)))


@pytest.mark.parametrize("depth", [0, 2])
def test_peanut_equals_peft_with_the_same_tensors(depth):
    from peft import PeanutConfig, get_peft_model

    model = linear()
    weights = busy(dt.init(dt.PEANuT(rank=6, depth=depth, scale=1.5).at("path:0"), model), size=0.3)
    theirs = get_peft_model(linear(), PeanutConfig(r=6, depth=depth, scaling=1.5, target_modules=["0"]))
    layer, p = theirs.base_model.model[0], {n.removeprefix("0.0."): t for n, t in weights.tensors.items()}
    pairs = {"A": layer.peanut_A["default"].weight, "B": layer.peanut_B["default"].weight}
    for name, parameter in pairs.items():
        copied(parameter, p[name])
    for name, modules in (("E", layer.peanut_encoders["default"]), ("F", layer.peanut_decoders["default"])):
        for i, module in enumerate(modules):
            copied(module.weight, p[name][i])
    assert weights.count == sum(t.numel() for t in theirs.parameters() if t.requires_grad)
    assert weights.count == 2 * 6 * 40 + 2 * depth * 6 * 6
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    bare, merged = model[0](x), dt.merge(model, weights)["0.weight"]
    attachment = dt.attach(model, weights)
    ours, reference = model[0](x), theirs(x)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    ours.square().mean().backward()
    reference.square().mean().backward()
    for name, leaf in attachment.named_parameters():
        if name[-1] in pairs:
            torch.testing.assert_close(leaf.grad, pairs[name[-1]].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, theirs.merge_and_unload()[0].weight, rtol=1e-5, atol=1e-5)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match=r"PEANuT\(rank=0\)"):
        dt.PEANuT(rank=0)
    with pytest.raises(dt.DeltaTuneError, match=r"PEANuT\(depth=-1\)"):
        dt.PEANuT(depth=-1)
