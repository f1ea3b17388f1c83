"""Gathering: ports of one batched method become one, whose tensors have a row in front for each row of the batch.

One product with a stack of small matrices replaces a loop over deltas. What cannot be gathered runs by rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltatune.core.calls import Ports
from deltatune.core.leaves import Tensors
from deltatune.core.method import Bag
from deltatune.core.ports import Entrance, InputPort, LinearPort, StreamPort
from deltatune.core.rows import Rows
from deltatune.core.together import TOGETHER, Fusion, Joint, LinearRows, Share, StreamRows, Together


class Gathered:
    """The tensors of one method for many rows: each stacked [rows, ...], vectors as [rows, 1, n]."""

    def __init__(self, rows: list[Tensors], dtype: torch.dtype) -> None:
        self.rows = rows
        learning = any(t.requires_grad for tensors in rows for t in tensors.live().values())
        self.dtype, self.kept = dtype, None if learning else self._stacked(dtype)

    def _stacked(self, dtype: torch.dtype) -> Bag:
        by_tensors = {id(tensors): vars(tensors(dtype)) for tensors in self.rows}
        bags = [by_tensors[id(tensors)] for tensors in self.rows]
        return Bag({name: _stack([bag[name] for bag in bags]) for name in bags[0]})

    def __call__(self, dtype: torch.dtype) -> Any:
        """Return the tensors in the compute dtype."""
        if self.kept is None:
            return self._stacked(dtype)
        if dtype == self.dtype:
            return self.kept
        return Bag({name: tensor.to(dtype) for name, tensor in vars(self.kept).items()})


def _stack(tensors: list[Tensor]) -> Tensor:
    like = tensors[0]
    if like.dim() == 2 and like.shape[0] > like.shape[1]:  # by columns: what follows is a product with the transposed
        return torch.stack([t.mT for t in tensors]).mT
    stacked = torch.stack(tensors)
    return stacked if stacked.dim() > 2 else stacked.reshape(len(tensors), 1, -1)


class GatheredLinear(LinearPort):
    """post: y -> method.output(p, x, y, base), with tensors of each row's own."""

    def __init__(self, port: LinearPort, rows: list[Tensors], dtype: torch.dtype) -> None:
        super().__init__(port.site, port.method, Gathered(rows, dtype))  # type: ignore[arg-type]
        self.count = len(rows)

    def before(self, here: Ports) -> list[LinearPort]:
        return []  # only what stands first is gathered

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        return super().post(here, (_by_row(x, self.count),), {}, _by_row(y, self.count)).view(y.shape)


class GatheredStream(StreamPort):
    """pre or post: h -> method.stream(p, h), with tensors of each row's own."""

    def __init__(self, port: StreamPort, rows: list[Tensors], dtype: torch.dtype) -> None:
        super().__init__(port.site, port.method, Gathered(rows, dtype), port.first)  # type: ignore[arg-type]
        self.count = len(rows)

    def _changed(self, h: Tensor) -> Tensor:
        return super()._changed(_by_row(h, self.count)).reshape(h.shape)


def _by_row(x: Tensor, rows: int) -> Tensor:
    return x if x.dim() == 3 and x.shape[0] == rows else x.reshape(rows, -1, x.shape[-1])


def _gathered(shares: list[Share], fusion: Fusion, kind: type, alone: Callable[[Share], bool]) -> list[Share]:
    """Return the shares with those of one batched method, and of tensors of the same shapes, made into one."""
    groups: dict[Any, list[Share]] = {}
    for place, share in enumerate(shares):
        port = share.port
        shapes = tuple((name, tuple(t.shape)) for name, t in port.tensors.live().items())
        together = port.method.batched and not alone(share)
        groups.setdefault((port.method, port.site.part, shapes) if together else place, []).append(share)
    return [group[0] if len(group) == 1 else _gather(group, fusion, kind) for group in groups.values()]


def _gather(group: list[Share], fusion: Fusion, kind: type) -> Share:
    owned = {row: share.port.tensors for share in group for row in share.rows.index}
    by_row = [(row, owned[row]) for row in sorted(owned)]
    index = tuple(row for row, _ in by_row)
    rows = fusion.once(("rows", index), lambda: Rows(index, fusion.total, fusion.device))
    module = group[0].here.module
    dtype = next((t.dtype for t in module.parameters() if t.is_floating_point()), torch.float32)
    return Share(rows, kind(group[0].port, [tensors for _, tensors in by_row], dtype), group[0].here, {})


def _linear(shares: list[Share], fusion: Fusion) -> Any:
    return _lone(_gathered(shares, fusion, GatheredLinear, lambda s: bool(s.port.before(s.here))), LinearRows, fusion)


def _stream(shares: list[Share], fusion: Fusion) -> Any:
    return _lone(_gathered(shares, fusion, GatheredStream, lambda s: False), StreamRows, fusion)


def _lone(shares: list[Share], kind: type[Together], fusion: Fusion) -> Any:
    """Return the only port where it has all rows, else all of them together."""
    return shares[0].port if len(shares) == 1 and shares[0].rows.whole else kind(shares, fusion)


TOGETHER[LinearPort] = Joint(_linear)
TOGETHER[Entrance] = Joint(lambda shares, fusion: None)
TOGETHER[InputPort] = Joint(lambda shares, fusion: _linear([replace(s, port=s.port.late) for s in shares], fusion))
TOGETHER[StreamPort] = Joint(_stream)
