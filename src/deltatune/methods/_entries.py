"""Entries of a matrix: which ones, chosen at random once, and a matrix that has only those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Given, Init, Leaf, Shape
from deltatune.core.method import Base, Method, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class Distinct(Init):
    """Distinct random whole numbers below `below`, int64."""

    below: int

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.randperm(self.below, generator=generator)[: shape[0]]


def check_entries(method: Method, entries: int, site: Site) -> None:
    """Raise `DeltaTuneError` for more entries than a site's weight has."""
    if entries > site.d_out * site.d_in:
        raise DeltaTuneError(
            f"{type(method).__name__}(entries={entries}) exceeds the {site.d_out * site.d_in} entries of "
            f"{site.path!r}: {site.d_out} x {site.d_in}."
        )


def picked(entries: int, site: Site) -> Leaf:
    """Return the leaf of random places (row major) in a site's weight, regenerated from the seed."""
    return Leaf((entries,), Distinct(site.d_out * site.d_in), trained=False)


def scatter(values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    """Return the matrix [rows, columns] that holds `values` at `places` (row major) and 0 elsewhere."""
    return values.new_zeros(rows * columns).scatter(0, places, values).view(rows, columns)


class SparseSpectrum(OnLinear):
    """A change of a weight that is the inverse transform of a matrix with few entries."""

    entries: int
    init: Init
    rate: float = 1.0

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, entries=self.entries)

    def change(self, p: Any, d_out: int, d_in: int) -> Tensor:
        """Return W' - W [d_out, d_in]."""
        raise NotImplementedError

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_entries(self, self.entries, site)
        return {"c": Leaf((self.entries,), self.init, rate=self.rate), "idx": picked(self.entries, site)}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + self.change(p, *W.shape).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + F.linear(x.to(y.dtype), self.change(p, y.shape[-1], x.shape[-1]))
