"""HRA: the input of a layer goes through a chain of Householder reflections (Yuan et al., 2024, arXiv:2405.17484).

    W' = W H_1 ... H_rank        H_i = I - 2 u_i u_i^T / |u_i|^2        U = (u_1 ... u_rank): [d_in, rank]

`order` adds order |I - U^T U|^2 to the loss, the paper's pull towards orthogonal reflections (U with unit columns). The
columns start uniform (Kaiming) and equal in pairs, whose reflections cancel: hence an even rank, and a neutral start.
Parameters: rank d_in a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Given, Init, KaimingUniform, Leaf, Shape
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class Pairs(Init):
    """Columns 2 i and 2 i + 1 equal, each pair as `of` fills it."""

    of: Init = KaimingUniform()

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return self.of.fill((shape[0], shape[1] // 2), generator, given).repeat_interleave(2, 1)


@dataclass(frozen=True)
class HRA(OnLinear):
    """Householder reflection adaptation: W' = W H_1 ... H_rank (Yuan et al., 2024)."""

    rank: int = 8
    order: float = 0.0
    init: Init = Pairs()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, 2, rank=self.rank)
        check_least(self, 0, order=self.order)
        if self.rank % 2:
            raise DeltaTuneError(
                f"HRA(rank={self.rank}) cannot start neutral: reflections cancel in pairs; write an even rank."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        if self.rank > site.d_in:
            raise DeltaTuneError(f"HRA(rank={self.rank}) exceeds the width {site.d_in} of the input of {site.path!r}.")
        return {"U": Leaf((site.d_in, self.rank), self.init)}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        V, M = self._compact(p, W)
        return W - (W @ V) @ M @ V.mT

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        x = x.to(y.dtype)
        V, M = self._compact(p, x)
        return y - F.linear((x @ V) @ M.mT @ V.mT, base.weight)

    def penalty(self, p: Any) -> Tensor | None:
        """Return order |I - U^T U|^2 with unit columns (Yuan et al., 2024)."""
        if self.order == 0:
            return None
        U = F.normalize(p.U, dim=0)
        return self.order * (torch.eye(self.rank, dtype=U.dtype, device=U.device) - U.mT @ U).square().sum()

    def _compact(self, p: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return V and M with H_1 ... H_rank = I - V M V^T (compact WY: U T U^T, T^-1 = triu(U^T U) - diag / 2).

        V holds sums and differences of the pairs of U: a fresh pair has the difference 0 and its sum the weight 0,
        exactly so in every dtype when T is solved for in float64.
        """
        U = p.U.to(torch.float64)
        G, eye = U.mT @ U, torch.eye(self.rank, dtype=torch.float64, device=U.device)
        T = torch.linalg.solve_triangular(G.triu() - eye * G / 2, eye, upper=True)
        return _sums(U).to(like.dtype), (_sums(_sums(T).mT).mT / 4).to(like.dtype)


def _sums(Z: Tensor) -> Tensor:
    """Return Z with the columns of each pair replaced by their sum and their difference."""
    first, second = Z.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first + second, first - second), -1).flatten(-2)
