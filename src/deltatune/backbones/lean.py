"""Lean backbones: what transformers composes of many operations, as one operation that computes the same.

    gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    norm(x) = w x / sqrt(mean(x^2) + eps)

Composed, a gradient through the first keeps five tensors of the width of the feed-forward layer, and the kernel keeps x. A
gradient through the second takes a dozen passes over its input; written out it takes seven.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from deltatune.backbones.gated import gated
from deltatune.core.fused import Remade, recorded

WIDTH = 8

Find = Callable[[nn.Module], nn.Module | None]  # the module that computes the same in one operation, or None


def make_lean(model: nn.Module, finds: Sequence[Find] = ()) -> None:
    """Replace composed activations, norms and gated layers of a transformers model, in place; its parameters stay the same.

    `finds` says which are sought, all of them unless given.
    """
    found = [
        (module, name, lean)
        for module in model.modules()
        for name, child in module.named_children()
        for find in finds or FINDS
        if (lean := find(child)) is not None
    ]
    for module, name, lean in found:
        setattr(module, name, lean)


def gelu(module: nn.Module) -> nn.Module | None:
    """Return the kernel of the composed GELU."""
    from transformers.activations import NewGELUActivation

    return nn.GELU(approximate="tanh") if type(module) is NewGELUActivation else None


def norm(module: nn.Module) -> nn.Module | None:
    """Return the norm by the root of the mean square that a module is."""
    eps = _eps(module)
    return None if eps is None else Norm(cast(nn.Parameter, module._parameters["weight"]), eps)


FINDS: tuple[Find, ...] = (gelu, norm, gated)


class RootMeanSquare(Remade):
    """norm(x) for x [..., d] and w [d], with statistics in float32; keeps x and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        f, ctx.eps = _wide(x), eps
        scale = _scale(f, eps)
        ctx.save_for_backward(x, w, scale)
        return (f * scale).to(x.dtype) * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (x, w, scale) = grads, ctx.saved_tensors
        again, f = torch.is_grad_enabled(), _wide(x)
        scale = _scale(f, ctx.eps) if again else scale  # what is kept of the statistics is cut off from x
        gw = (g * (f * scale).to(g.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        gu = (g * w).to(scale.dtype)
        along = (gu * f).mean(-1, keepdim=True) * scale.square()
        gx = (gu - f * along) * scale if again else gu.addcmul_(f, along, value=-1).mul_(scale)
        return gx.to(x.dtype), gw, None

    @staticmethod
    def again(ctx: Any) -> Tensor:
        x, w, scale = ctx.saved_tensors
        return _normed(x, w, ctx.eps, None if torch.is_grad_enabled() else scale)


def _wide(x: Tensor) -> Tensor:
    """Return x in the type of its statistics; a CPU is slow to mix types in one operation."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scale(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps), [..., 1], for a wide x."""
    size = torch.linalg.vector_norm(x, 2, -1, True)
    return (size.square() / x.shape[-1] + eps).rsqrt()


def _normed(x: Tensor, w: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    f = _wide(x)
    return (f * (_scale(f, eps) if scale is None else scale)).to(x.dtype) * w


class Norm(nn.Module):
    """A norm by the root of the mean square."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        if recorded():
            return cast(Tensor, RootMeanSquare.apply(x, self.weight, self.eps))
        return _normed(x, self.weight, self.eps)


def _eps(module: nn.Module) -> float | None:
    """Return the eps of a module that computes norm(x), found by trying it with numbers of its own, or None."""
    numbers = [value for value in vars(module).values() if isinstance(value, float)]
    if list(module._parameters) != ["weight"] or len(numbers) != 1 or module._buffers or module._modules:
        return None
    weight, trial = module._parameters["weight"], copy.copy(module)
    if weight is None or weight.dim() != 1 or "norm" not in type(module).__name__.lower():
        return None
    with _disable_current_modes(), torch.no_grad():  # a plan looks at a model that has no numbers
        ramp = torch.linspace(0.5, 2, WIDTH)
        trial._parameters = {"weight": nn.Parameter(ramp)}
        x = torch.stack([ramp, (ramp - 1) * numbers[0] ** 0.5])  # the second one sees eps
        same = torch.allclose(trial(x), _normed(x, ramp, numbers[0]), rtol=1e-5, atol=1e-6)
    return numbers[0] if same else None
