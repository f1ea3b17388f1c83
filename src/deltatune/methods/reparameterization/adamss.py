"""AdaMSS: the rows of a weight, in groups that lie in one small subspace each (Zheng et al., NeurIPS 2025).

    W' = W + [B_o . A_g(o) V^T]_o        V^T: [r, d_in]   A: [groups, rank, r]   B: [d_out, rank]   o a row, g(o) its group

V^T are the r = `size` principal right singular vectors of [W, b], from a randomised decomposition as in peft, and the groups
are clusters (k-means) of the rows of the left ones; both are not trained and travel with the weights. The bias column of
V^T gives the bias its change. A starts as each group's principal directions, B at zero, so the delta starts neutral. The
paper's schedule that freezes unimportant groups is not here (off in peft as well). Parameters: groups rank r + d_out rank
a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._kmeans import cluster
from deltatune.methods._sizes import check_least
from deltatune.methods._subspaces import subspaces


@dataclass(frozen=True)
class Subspaces(Init):
    """One part of the decomposition: the directions V of the weights or of the bias, the groups, or each group's start A."""

    part: str
    size: int
    groups: int

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        U, Vt = given.once(("subspaces", self.size), lambda: subspaces(given.site, given.tensors, self.size))
        if self.part == "V":
            return Vt[:, : given.site.d_in].contiguous()
        if self.part == "c":
            return Vt[:, given.site.d_in] if given.site.bias else torch.zeros(shape)
        group = given.once(("groups", self.size, self.groups), lambda: cluster(U, self.groups))
        if self.part == "g":
            return group
        return torch.stack([_principal(U[group == g], shape[1]) for g in range(self.groups)])


def _principal(rows: Tensor, rank: int) -> Tensor:
    """Return `rank` orthonormal directions [rank, r], those in which a group's rows are largest first."""
    return torch.linalg.svd(rows, full_matrices=True).Vh[:rank]


@dataclass(frozen=True)
class AdaMSS(OnLinear):
    """Adaptive multi-subspace adaptation: row o changes by B_o A_g(o) V^T (Zheng et al., 2025)."""

    size: int = 100
    groups: int = 5
    rank: int = 1

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, size=self.size, groups=self.groups, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        size, groups = min(self.size, site.d_in + site.bias, site.d_out), min(self.groups, site.d_out)
        rank = min(self.rank, size)

        def part(name: str, *shape: int) -> Leaf:
            return Leaf(shape, Subspaces(name, size, groups), trained=name == "A", stored=name != "A")

        fixed = {"V": part("V", size, site.d_in), "c": part("c", size), "g": part("g", site.d_out)}
        return {"A": part("A", groups, rank, size), "B": Leaf((site.d_out, rank)), **fixed}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + (_rows(p) @ p.V).to(W.dtype)

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        return None if b is None else b + (_rows(p) @ p.c).to(b.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        z = x.to(y.dtype) @ p.V.mT
        rows = _rows(p)
        change = z @ rows.mT
        return y + change if base.bias is None else y + change + rows @ p.c


def _rows(p: Any) -> Tensor:
    """Return B_o A_g(o) for every row, [d_out, r]."""
    return (p.B[:, None] @ p.A[p.g]).squeeze(1)
