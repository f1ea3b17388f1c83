"""Rows: which rows of a batch belong to whom, and how a tensor is taken apart and put together by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.errors import DeltaTuneError


class Rows:
    """Some rows of a route of `total`, in rising order.

    A tensor may have a multiple of `total` rows: beams, returned sequences and tokens that a backbone laid out flat stand
    one behind the other, row by row. A tensor of one row is for all.
    """

    def __init__(self, index: Sequence[int], total: int, device: torch.device) -> None:
        self.index, self.total = tuple(index), total
        self.count = len(self.index)
        self.first = self.index[0] if self.index else 0
        self.run = self.index == tuple(range(self.first, self.first + self.count))
        self.at = torch.tensor(self.index, dtype=torch.long, device=device)

    @property
    def whole(self) -> bool:
        """Whether these are all rows."""
        return self.count == self.total

    def wide(self, x: Tensor) -> Tensor:
        """Return x [total * n, ...] as [total, n, ...]; raises `DeltaTuneError` when it has no such rows."""
        if x.shape[0] == 1:
            x = x.expand(self.total, *x.shape[1:])
        if x.shape[0] % self.total:
            raise DeltaTuneError(
                f"a tensor of the shape {tuple(x.shape)} has no rows of a batch of {self.total} in front, so it cannot be "
                "routed; leave its place out of the delta's where."
            )
        return x.unflatten(0, (self.total, -1))

    def take(self, x: Tensor) -> Tensor:
        """Return these rows of x."""
        if self.whole and x.shape[0] > 1:
            return x
        wide = self.wide(x)
        chosen = wide.narrow(0, self.first, self.count) if self.run else wide.index_select(0, self.at)
        return chosen.flatten(0, 1)


def _by_row(piece: Tensor, count: int) -> Tensor:
    """Return a piece as [count, n, ...]; one row is for all of them."""
    return piece.expand(count, *piece.shape[1:])[:, None] if piece.shape[0] == 1 else piece.unflatten(0, (count, -1))


class Split:
    """A route's rows by whom they belong to; some may belong to nobody."""

    def __init__(self, parts: Sequence[Rows], total: int, device: torch.device) -> None:
        self.parts, self.total = tuple(parts), total
        taken = [row for part in self.parts for row in part.index]
        self.rest = Rows([row for row in range(total) if row not in set(taken)], total, device)
        order = [*taken, *self.rest.index]
        self.sorted = order == list(range(total))
        back = torch.empty(total, dtype=torch.long)
        back[torch.tensor(order, dtype=torch.long)] = torch.arange(total)
        self.back = back.to(device)

    def join(self, pieces: Sequence[Tensor], y: Tensor) -> Tensor:
        """Return y with each part's rows replaced by its piece."""
        return self.assemble([*pieces, self.rest.take(y)] if self.rest.count else pieces)

    def assemble(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return all rows from each part's piece and, where some rows belong to nobody, theirs as the last."""
        if self.parts[0].whole:
            return pieces[0]
        counts = [part.count for part in (*self.parts, self.rest) if part.count]
        wide = [_by_row(piece, count) for piece, count in zip(pieces, counts, strict=True)]
        joined = torch.cat(wide)
        return (joined if self.sorted else joined.index_select(0, self.back)).flatten(0, 1)
