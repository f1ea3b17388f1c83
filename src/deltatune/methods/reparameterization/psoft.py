"""PSOFT: an orthogonal change in the principal subspace of a weight (Wu et al., 2025, arXiv:2505.11235).

    W' = W + B (diag(b) R diag(a) - I) A        R = (I + Q) (I - Q)^-1, Q = -Q^T: [rank, rank]

A: [rank, d_in] holds the first right singular vectors of W and B = W A^T: [d_out, rank]; both are stored, as they come
from the backbone. A leaf holds the upper triangle of Q, row by row; it starts at zero, a and b: [rank] at one, so the
delta starts neutral. Parameters: rank (rank - 1) / 2 + 2 rank a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Ones, Shape
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._low_rank import principal
from deltatune.methods._rotate import cayley, skew, triangle
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class RightVectors(Init):
    """The right singular vectors of the site's weight with the largest singular values, as rows."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return principal(given, shape[0])[2]


@dataclass(frozen=True)
class LeftVectors(Init):
    """The left singular vectors of the site's weight times the largest singular values, as columns."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        U, S, _ = principal(given, shape[1])
        return U * S


@dataclass(frozen=True)
class PSOFT(OnLinear):
    """Principal subspace orthogonal finetuning: W' = W + B (diag(b) R diag(a) - I) A (Wu et al., 2025)."""

    rank: int = 32

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, 2, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        return {
            "Q": Leaf((triangle(self.rank),)),
            "a": Leaf((self.rank,), Ones()),
            "b": Leaf((self.rank,), Ones()),
            "A": Leaf((self.rank, site.d_in), RightVectors(), trained=False, stored=True),
            "B": Leaf((site.d_out, self.rank), LeftVectors(), trained=False, stored=True),
        }

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + (p.B @ self._middle(p) @ p.A).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + x.to(y.dtype) @ p.A.mT @ self._middle(p).mT @ p.B.mT

    def _middle(self, p: Any) -> Tensor:
        R = cayley(-skew(p.Q, self.rank))
        return p.b[:, None] * R * p.a - torch.eye(self.rank, dtype=R.dtype, device=R.device)
