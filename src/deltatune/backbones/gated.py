"""Gated feed-forward layers: their product as one operation, which keeps two tensors where the parts keep three.

y = down(h)    h = silu(g) u    g = gate(x)    u = up(x)
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from itertools import permutations
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from deltatune.core.fused import Remade, recorded
from deltatune.core.ports import watched

WIDTH = 4


class GatedProduct(Remade):
    """h = silu(g) u; keeps g and u, and computes silu(g) again."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,), (g, u) = grads, ctx.saved_tensors
        to_g, to_u = ctx.needs_input_grad
        if torch.is_grad_enabled():
            s = torch.sigmoid(g)
            return slope * u * (s * (1 + g * (1 - s))), slope * F.silu(g)
        gu = F.silu(g).mul_(slope) if to_u else None
        through = slope * u if to_g else None
        gg = None if through is None else torch.ops.aten.silu_backward.grad_input(through, g, grad_input=through)
        return gg, gu

    @staticmethod
    def again(ctx: Any) -> Tensor:
        g, u = ctx.saved_tensors
        return F.silu(g) * u


class Gated(nn.Module):
    """A module that computes down(act(gate(x)) * up(x)) for its own children, which keep their names."""

    def __init__(self, module: nn.Module, gate: str, up: str, down: str, act: str) -> None:
        super().__init__()
        self.__dict__.update(module.__dict__)
        self._names, self._kind = (gate, up, down, act), type(module._modules[act])

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down, act = (cast(nn.Module, self._modules[name]) for name in self._names)
        g, u = gate(x), up(x)
        plain = type(act) is self._kind and not watched(act)  # nobody else has a hand in it
        if plain and g.dtype == u.dtype and recorded():
            return down(GatedProduct.apply(g, u))
        return down(act(g) * u)


def gated(module: nn.Module) -> Gated | None:
    """Return the module that computes the same with one product, found by trying it with numbers, or None."""
    linears = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
    others = [name for name in module._modules if name not in linears]
    own = [*module._parameters, *module._buffers]
    if len(linears) != 3 or len(others) != 1 or own or watched(module):
        return None
    (act,) = others
    kind: Any = type(module).forward
    if len(inspect.signature(kind).parameters) != 2 or [*cast(nn.Module, module._modules[act]).parameters()]:
        return None
    found = next(_roles(module, linears), None)
    return None if found is None else Gated(module, *found, act)


def _roles(module: nn.Module, linears: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield which of the children are gate, up and down, where the module computes that."""
    trial, draw = copy.copy(module), torch.Generator().manual_seed(0)
    with _disable_current_modes(), torch.enable_grad():  # a plan looks at a model that has no numbers
        W = {name: torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64) for name in linears}
        trial._modules = {**module._modules, **{name: _linear(weight) for name, weight in W.items()}}
        x = torch.randn(1, 2, WIDTH, generator=draw, dtype=torch.float64).requires_grad_()
        try:
            seen = _with_slope(trial(x), x)
        except Exception:  # what cannot take such an input is something else
            return
        for gate, up, down in permutations(linears):
            y = F.linear(F.silu(x @ W[gate].T) * (x @ W[up].T), W[down])
            if all(map(torch.allclose, seen, _with_slope(y, x))):
                yield gate, up, down


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def _with_slope(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return y, torch.autograd.grad(y.square().sum(), x)[0]
