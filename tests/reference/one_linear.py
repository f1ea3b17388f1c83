"""One linear layer with a method of ours, and the same layer wrapped by peft with the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt

Target = str | tuple[str, Callable[[Tensor], Tensor]]


class One(nn.Module):
    """A model of one linear layer, addressed `path:only`."""

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.only = nn.Linear(d_in, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def layer(d_in: int = 24, d_out: int = 40, bias: bool = True) -> One:
    """Return a seeded model of one linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return One(d_in, d_out, bias)


def inputs(d_in: int = 24) -> Tensor:
    """Return x [2, 5, d_in]."""
    return torch.randn(2, 5, d_in, generator=torch.Generator().manual_seed(7))


def moved(method: Any, model: nn.Module, size: float = 0.2) -> tuple[dt.Weights, dict[str, Tensor]]:
    """Return weights of `method` for the model's layer, moved away from their start, and their tensors by leaf."""
    fresh, generator = dt.init(method.at("path:only"), model), torch.Generator().manual_seed(11)
    noisy = {n: t + size * torch.randn(t.shape, generator=generator) for n, t in fresh.tensors.items()}
    weights = replace(fresh, tensors=noisy)
    return weights, {name.rpartition(".")[2]: tensor for name, tensor in weights.held.items()}


def wrapped(config: Any, model: nn.Module) -> Any:
    """Return peft's wrapping of the model, in evaluation mode."""
    from peft import get_peft_model

    return get_peft_model(model, config).eval()


def check_peft(method: Any, config: Any, targets: dict[str, Target], d_in: int = 24, d_out: int = 40) -> None:
    """Assert that peft, given our tensors, has our outputs, our gradients, our merged weight and our count.

    `targets` names peft's tensor for each leaf, alone (equal shapes, gradients compared) or with a map from ours to it.
    """
    model, reference, x = layer(d_in, d_out), wrapped(config, layer(d_in, d_out)), inputs(d_in)
    theirs = reference.base_model.model.only
    weights, leaves = moved(method, model)
    assert set(leaves) == set(targets)
    for leaf, target in targets.items():
        path, change = target if isinstance(target, tuple) else (target, lambda tensor: tensor)
        found, wanted = attrgetter(path)(theirs), change(leaves[leaf])
        assert found.shape == wanted.shape
        found.data.copy_(wanted)
    bare = model(x)
    attachment = dt.attach(model, weights)
    ours, other = model(x), reference(x)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    ours.square().mean().backward()
    other.square().mean().backward()
    trained = {name.rpartition(".")[2]: p.grad for name, p in attachment.named_parameters()}
    plain = {leaf: target for leaf, target in targets.items() if isinstance(target, str) and leaf in trained}
    for leaf, path in plain.items():
        assert trained[leaf].abs().max() > 0
        torch.testing.assert_close(trained[leaf], attrgetter(path)(theirs).grad, rtol=1e-4, atol=1e-6)
    if len(plain) == len(trained):
        assert weights.count == sum(p.numel() for p in reference.parameters() if p.requires_grad)
    check_merged(model, weights, reference)


@torch.no_grad()
def check_merged(model: nn.Module, weights: dt.Weights, reference: Any) -> None:
    """Assert that our merged weight and bias are those that peft merges."""
    ours = dt.merge(model, weights)
    theirs = dict(reference.merge_and_unload().named_parameters())
    for path, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[path], rtol=1e-5, atol=1e-5)
    assert ours
