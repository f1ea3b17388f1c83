"""(IA)^3: keys, values and the FFN's inner activations are rescaled (Liu et al., 2022, arXiv:2205.05638).

    y' = l * y             W' = l W,   b' = l * b     l: [d_out, 1]     at a module's output
    y' = W (l * x) + b     W' = W * l                 l: [1, d_in]      at a module's input

The where's side says which. l starts at one, so the delta starts neutral. Parameters: d_out a site at outputs, d_in at
inputs; 2 d_kv + d_ff a layer at the default place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from deltatune.core.fused import Remake, fusible, remake
from deltatune.core.leaf import Leaf, Ones
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site


@dataclass(frozen=True)
class IA3(OnLinear):
    """(IA)^3: y' = l * y at outputs, y' = W (l * x) + b at inputs (Liu et al., 2022)."""

    batched = True
    where = "{{attn.{k,v},cross.{k,v}?}:out,ffn.down:in}"

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"l": Leaf((1, site.d_in) if site.side == "in" else (site.d_out, 1), Ones())}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W * p.l.to(W.dtype)

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        return b if b is None or _at_input(p) else b * p.l.flatten().to(b.dtype)

    def enters(self, site: Site) -> bool:
        return site.side == "in"

    def input(self, p: Any, x: Tensor) -> Tensor:
        return _scaled(x, p.l)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        if _at_input(p):
            return F.linear(_scaled(x.to(y.dtype), p.l), base.weight.to(y.dtype), base.bias)
        return _scaled(y, p.l.mT)


class Scaled(Function):
    """x * l for x [..., d] and l [1, d], where x need not be kept because it can be made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, l: Tensor, again: Remake) -> Tensor:  # noqa: E741
        ctx.again = again
        ctx.save_for_backward(l)
        return x * l

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (l,) = grads, ctx.saved_tensors  # noqa: E741
        gx = g * l if ctx.needs_input_grad[0] else None
        x = ctx.again()
        product = x.mul_(g) if ctx.again.released else g * x
        return gx, product.flatten(0, -2).sum(0, keepdim=True), None


def _scaled(x: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Return x * l."""
    again = remake(x) if l.requires_grad and l.dim() == 2 and fusible() else None
    return x * l if again is None else cast(Tensor, Scaled.apply(x, l, again))


def _at_input(p: Any) -> bool:
    return p.l.shape[-1] > 1
