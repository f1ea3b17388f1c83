"""GraLoRA: a grid of low-rank changes, one for every block of a weight (Jung et al., 2025, arXiv:2505.20355).

    W'_ij = W_ij + (alpha / rank) B_ij A_ij        i, j < grid, ranks of B_ij A_ij: rank / grid

A: [grid, rank, d_in / grid] holds at j the A_ij below each other, B: [grid, d_out / grid, rank] at i the B_ij beside
each other: as many parameters as LoRA and grid times its rank. A starts uniform (Kaiming), B at zero, so the delta
starts neutral. Parameters: rank (d_in + d_out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core.leaf import Init, KaimingUniform, Leaf, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_divides, check_least, check_rank


@dataclass(frozen=True)
class GraLoRA(OnLinear):
    """Granular low-rank adaptation: W'_ij = W_ij + (alpha / rank) B_ij A_ij on a grid of blocks (Jung et al., 2025)."""

    rank: int = 32
    alpha: float = 64.0
    grid: int = 2
    init: Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank, grid=self.grid)
        if self.rank % self.grid:
            raise DeltaTuneError(
                f"GraLoRA(rank={self.rank}, grid={self.grid}) share no rank; write a rank that {self.grid} divides."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        for width in (site.d_in, site.d_out):
            check_divides(self, "grid", self.grid, width, site)
        return {
            "A": Leaf((self.grid, self.rank, site.d_in // self.grid), self.init),
            "B": Leaf((self.grid, site.d_out // self.grid, self.rank), Zeros()),
        }

    def weight(self, p: Any, W: Tensor) -> Tensor:
        eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        return W + self._change(p, eye).mT

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + self._change(p, x.to(y.dtype))

    def _change(self, p: Any, x: Tensor) -> Tensor:
        down = torch.einsum("...jd,jrd->...jr", x.unflatten(-1, (self.grid, -1)), p.A.to(x.dtype))
        swapped = down.unflatten(-1, (self.grid, -1)).transpose(-3, -2).flatten(-2)  # [..., i, (j, rank / grid)]
        up = torch.einsum("...ir,idr->...id", swapped, p.B.to(x.dtype))
        return up.flatten(-2) * (self.alpha / self.rank)
