"""Leaves cast to the float type that a backbone computes in, all together instead of one by one where they are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from deltatune.core.attach import Attachment
from deltatune.core.leaves import key


class Casts:
    """The trained leaves of an attachment that are kept in another float type than `dtype`, each used at one site."""

    def __init__(self, attachment: Attachment, dtype: torch.dtype) -> None:
        uses = Counter(key(placement.name(leaf)) for placement in attachment.placements for leaf in placement.leaves)
        self.held, self.dtype = attachment.leaves, dtype
        # A leaf that many sites share sums their gradients, which it does in its own precision.
        self.own = {name: t for name, t in self.held.named_parameters() if uses[name] == 1 and t.dtype != dtype}

    @contextmanager
    def made(self) -> Iterator[None]:
        """The scope of one forward pass, which reads the leaves as they are cast now."""
        if not self.own:
            yield
            return
        cast: Any = Cast.apply(self.dtype, *self.own.values())
        self.held.cast[self.dtype] = dict(zip(self.own, cast, strict=True))
        try:
            yield
        finally:
            del self.held.cast[self.dtype]


class Cast(Function):
    """Tensors in another float type, and their gradients in their own."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [t.dtype for t in tensors]
        return _cast(tensors, [dtype] * len(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [(g, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True) if g is not None]
        cast = iter(_cast([g for g, _ in there], [dtype for _, dtype in there]))
        return None, *(None if g is None else next(cast) for g in grads)


def _cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    new = tuple(
        torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)
        for t, dtype in zip(tensors, dtypes, strict=True)
    )
    torch._foreach_copy_(new, tuple(tensors))  # type: ignore[reportPrivateImportUsage]
    return new
