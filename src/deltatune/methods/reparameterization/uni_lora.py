"""Uni-LoRA: all of LoRA's factors as copies of the entries of one vector (Li et al., 2025, arXiv:2506.00799).

    W' = W + B A        [A, B]_i = theta_j(i) / sqrt(n_j)        theta: [size], n: [size], shared by all sites

Entry i of the factors, counted over all sites, copies entry j(i) of theta; n_j entries copy entry j, as many as copy any
other, up to one. So the map from theta to all factors keeps lengths, as the paper's does. The j(i) and n_j are not trained
and come back from the seed. theta starts U(-0.02, 0.02), so the delta starts near neutral but not exactly. The default size
is the paper's for RoBERTa. Inside a combinator n_j counts at one site. Parameters: size in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape, Uniform
from deltatune.core.method import Base, Law, OnLinear, Own
from deltatune.core.site import Site
from deltatune.methods._low_rank import changed, routed
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class Balanced(Init):
    """A part of an endless sequence of rounds, each of all whole numbers below `below`, in random order, int64."""

    below: int
    start: int = 0

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        (first, begin), (last, end) = divmod(self.start, self.below), divmod(self.start + shape[0], self.below)
        if first == last:
            part = _round(first, self.below)[begin:end]
        else:
            whole = torch.arange(self.below).repeat(last - first - 1)
            part = torch.cat([_round(first, self.below)[begin:], whole, _round(last, self.below)[:end]])
        return part[torch.randperm(shape[0], generator=generator)]


@dataclass(frozen=True)
class Counts(Init):
    """How often each whole number is among the first `total` of that sequence, int64."""

    total: int

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        rounds, rest = divmod(self.total, shape[0])
        return rounds + torch.bincount(_round(rounds, shape[0])[:rest], minlength=shape[0])


def _round(number: int, below: int) -> Tensor:
    """Return one round of the sequence; which sites copy the same entries of theta depends on no seed."""
    return torch.randperm(below, generator=Generator().manual_seed(number))


@dataclass(frozen=True)
class UniLoRA(OnLinear):
    """One vector for all of LoRA: W' = W + B A, [A, B]_i = theta_j(i) / sqrt(n_j) (Li et al., 2025)."""

    rank: int = 4
    size: int = 23040
    init: Init = Uniform(0.02)

    where = "{attn.{q,v},cross.{q,v}?}"
    breaks: ClassVar[dict[Law, str]] = {"identity": "both factors start from one vector, which is not zero"}

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank, size=self.size)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return self.declared([site])[0]

    def leaves_at(self, sites: Sequence[Site], own: Own) -> list[dict[str, Leaf]]:
        return self.declared(sites)

    def declared(self, sites: Sequence[Site]) -> list[dict[str, Leaf]]:
        """Declare the tensors at all sites of a delta, in order."""
        for site in sites:
            check_rank(self, self.rank, site)
        starts = list(accumulate((self.rank * (site.d_in + site.d_out) for site in sites), initial=0))
        theta = Leaf((self.size,), self.init, scope="delta")
        n = Leaf((self.size,), Counts(starts[-1]), scope="delta", trained=False)
        return [
            {"j": Leaf((end - start,), Balanced(self.size, start), trained=False), "n": n, "theta": theta}
            for start, end in pairwise(starts)
        ]

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return changed(W, *self._factors(p, W.shape[1]))

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return routed(x, y, *self._factors(p, x.shape[-1]))

    def _factors(self, p: Any, d_in: int) -> tuple[Tensor, Tensor]:
        scaled = p.theta * p.n.clamp(min=1).to(p.theta.dtype).rsqrt()
        entries = scaled[p.j].view(self.rank, -1)
        return entries[:, :d_in], entries[:, d_in:].mT
