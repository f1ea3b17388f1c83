"""Activations of one kernel against those that transformers composes."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import NewGELUActivation

from deltatune.backbones.lean import make_lean


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.other = NewGELUActivation(), nn.GELU()


def test_the_composed_gelu_becomes_one_kernel_that_computes_the_same() -> None:
    model = nn.Sequential(Layer(), nn.Sequential(Layer()))
    composed, other = model[0].act, model[0].other
    make_lean(model)
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert model[0].other is other
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    for act in (model[0].act, model[1][0].act):
        torch.testing.assert_close(act(x), composed(x), rtol=0, atol=1e-12)
        ours, theirs = (torch.autograd.grad(f(x).sum(), x)[0] for f in (act, composed))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def kept(act: nn.Module) -> int:
    """The number of tensors as large as the input that autograd keeps."""
    x, found = torch.randn(1000, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        act(x.clone())
    return len({t.data_ptr() for t in found if t.numel() == 1000})


def test_the_kernel_keeps_its_input_alone() -> None:
    layer = Layer()
    before = kept(layer.act)
    make_lean(layer)
    assert kept(layer.act) == 1 < before
