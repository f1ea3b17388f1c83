"""Modules that see some tokens of a batch only, where every token is on its own: what a module spares that nobody reads.

    x [B, L, d]  ->  x[index] [1, n, d]  ->  module  ->  zeros [B, L, d] with y at index

Padding is spared in every feed-forward layer, and the tokens whose labels do not count in the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from deltatune.core.calls import Ports, run
from deltatune.core.fused import Make, Remade, maker_of
from deltatune.core.ports import Call
from deltatune.tuning.widths import wide

FEW = 64  # padding tokens that are not worth two copies


class Taken(Remade):
    """x[index] for x [..., d] as [1, n, d], or [n, d] for x [L, d]; each token once, so that its gradient is not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return _taken(x, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, Spread.apply(grads[0], *ctx.saved_tensors, ctx.shape)), None

    @classmethod
    def maker(cls, ctx: Any) -> Make | None:
        whole = maker_of(ctx)
        return None if whole is None else lambda: _taken(whole(), *ctx.saved_tensors)


class Spread(Function):
    """Zeros [..., d] of a shape with y [n, d], or [1, n, d], at index."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = y.shape
        every = y.new_zeros(shape[:-1].numel(), y.shape[-1])
        return every.index_copy_(0, index, y.flatten(0, -2)).view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return cast(Tensor, Taken.apply(grads[0], *ctx.saved_tensors)).view(ctx.shape), None, None


def _taken(x: Tensor, index: Tensor) -> Tensor:
    some = x.flatten(0, -2).index_select(0, index)
    return some[None] if x.dim() > 2 else some


class Tokens:
    """Some tokens of a batch, at `index` of all its tokens behind one another, each once.

    pre on a module hands on their hidden states alone; post on it or on a later one puts zeros in the place of the others;
    around does both.
    """

    method = "asked tokens"

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.shape = torch.Size()

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        x, *others = args
        self.shape = x.shape
        return (Taken.apply(x, self.index), *others), kwargs

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        return cast(Tensor, Spread.apply(y, self.index, self.shape))

    def around(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self.post(here, args, kwargs, run(Ports(here.module), *self.pre(here, args, kwargs)))


def present(mask: Tensor, totals: Sequence[int] = (), few: int | None = None) -> Tensor | None:
    """Return the places of the tokens of a batch that are no padding, for its mask [B, L]; None where fewer than `few`, or `FEW`, are.

    So many places of padding come with them as make their number the next of `totals`.
    """
    every = mask.flatten() != 0
    there = every.nonzero()[:, 0]
    count = wide(len(there), totals)
    if count + (FEW if few is None else few) > len(every):
        return None
    return torch.cat([there, (~every).nonzero()[: count - len(there), 0]])
