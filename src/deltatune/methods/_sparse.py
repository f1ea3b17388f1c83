"""Sparse changes: which k entries of a parameter, and the parameter with their values added.

Entries are counted row by row in the parameter as a site sees it: theta as stored, or W as [d_out, d_in].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError

Counts = tuple[tuple[str, int], ...]  # entries by the address of a site


class Entries(Init):
    """A choice of k distinct entries: int64 [k], ascending; those of the largest score."""

    stored: ClassVar[bool] = True  # where the choice cannot be made again from the seed alone

    def score(self, given: Given) -> Tensor:
        """Return a number for every entry; the largest are chosen."""
        raise NotImplementedError

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return self.score(given).flatten().topk(shape[0]).indices.sort().values


@dataclass(frozen=True)
class RandomEntries(Entries):
    """Entries drawn at random, each as likely as another."""

    stored = False

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.randperm(numel(given.site), generator=generator)[: shape[0]].sort().values


@dataclass(frozen=True)
class LargestWeights(Entries):
    """The entries of the largest magnitude |w|."""

    def score(self, given: Given) -> Tensor:
        return _own(given).abs()


@dataclass(frozen=True)
class SmallestWeights(Entries):
    """The entries of the smallest magnitude |w|."""

    def score(self, given: Given) -> Tensor:
        return -_own(given).abs()


@dataclass(frozen=True)
class LargestFisher(Entries):
    """The entries of the largest Fisher information, the mean squared gradient."""

    needs = frozenset({"fisher"})

    def score(self, given: Given) -> Tensor:
        return _about(given, "fisher")


@dataclass(frozen=True)
class LargestGradients(Entries):
    """The entries of the largest mean gradient |g|."""

    needs = frozenset({"gradient"})

    def score(self, given: Given) -> Tensor:
        return _about(given, "gradient").abs()


@dataclass(frozen=True)
class LargestSaliency(Entries):
    """The entries of the largest saliency |w g| (SNIP: Lee et al., 2019)."""

    needs = frozenset({"gradient"})

    def score(self, given: Given) -> Tensor:
        return (_own(given) * _about(given, "gradient")).abs()


def _own(given: Given) -> Tensor:
    return given.theta if given.site.tensor else given.weight


def _about(given: Given, kind: str) -> Tensor:
    found = given.about(kind)
    return found.to("cpu", torch.float32) if given.site.tensor else given.oriented(found)


def numel(site: Site) -> int:
    """Return the number of entries of a site's parameter."""
    return math.prod(site.shape) if site.tensor else site.d_out * site.d_in


def sparse_leaves(k: int, entries: Entries) -> dict[str, Leaf]:
    """Declare `value` [k], trained from zero, and `index` [k], the entries they are added to."""
    return {"value": Leaf((k,)), "index": Leaf((k,), entries, trained=False, stored=entries.stored)}


def add_at(theta: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Return theta with `value` [k] added at the entries `index` [k]."""
    return theta.flatten().scatter_add(0, index, value.to(theta.dtype)).view(theta.shape)


def sparse_linear(x: Tensor, index: Tensor, value: Tensor, d_out: int) -> Tensor:
    """Return x S^T [..., d_out] for the matrix S [d_out, d_in] that has only `value` [k] at the entries `index` [k]."""
    S = value.new_zeros(d_out * x.shape[-1]).scatter(0, index, value)
    return x.to(value.dtype) @ S.view(d_out, -1).mT


def check_share(name: str, share: float) -> None:
    """Raise `DeltaTuneError` for a share of entries that is not in (0, 1]."""
    if not 0 < share <= 1:
        raise DeltaTuneError(
            f"{name}(share={share}) is no share of a parameter's entries; write one above 0 and up to 1, e.g. share=0.005."
        )


def size(site: Site, share: float, counts: Counts) -> int:
    """Return how many entries a site has: what `counts` says, or `share` of them and at least one."""
    if counts:
        return dict(counts).get(site.address, 0)
    return max(1, round(share * numel(site)))


def top_of_all(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return, tensor by tensor, the flat places of the entries among the largest `share` of all tensors together."""
    sizes = torch.tensor([score.numel() for score in scores])
    best = torch.cat([score.flatten() for score in scores]).topk(max(1, round(share * int(sizes.sum())))).indices
    places = best.sort().values
    ends = sizes.cumsum(0)
    parts = places.tensor_split(torch.searchsorted(places, ends)[:-1])
    return [part - (end - size) for part, end, size in zip(parts, ends, sizes, strict=True)]


def by_module(sites: Sequence[Site], picked: Sequence[Tensor]) -> dict[str, Counts]:
    """Return {a where that finds one module: the counts of its parameters} for all modules with an entry picked."""
    found: dict[str, Counts] = {}
    for site, places in zip(sites, picked, strict=True):
        paths = dict.fromkeys(f"path:{path}" for path in [site.path, *(path for path, _ in site.ties)])
        where = next(iter(paths)) if len(paths) == 1 else f"{{{','.join(paths)}}}"
        if places.numel():
            found[where] = (*found.get(where, ()), (site.address, places.numel()))
    return found
