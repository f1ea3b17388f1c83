"""Bat: every block of a weight goes through an affine map of its row (Kang and Yin, 2024, arXiv:2409.15371).

    W'_ij = W_ij + W_ij M_i + M_i        W_ij, M_i: [block, block]        i < d_out / block   j < d_in / block

M: [d_out / block, block, block] starts at zero, so the delta starts neutral. Parameters: d_out block a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import OnLinear
from deltatune.core.site import Site
from deltatune.methods._sizes import check_divides, check_least


@dataclass(frozen=True)
class Bat(OnLinear):
    """Block affine transformation: W'_ij = W_ij + W_ij M_i + M_i (Kang and Yin, 2024)."""

    block: int = 64

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, block=self.block)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        for width in (site.d_in, site.d_out):
            check_divides(self, "block", self.block, width, site)
        return {"M": Leaf((site.d_out // self.block, self.block, self.block))}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        blocks = W.unflatten(1, (-1, self.block)).unflatten(0, (-1, self.block)).transpose(1, 2)  # [i, j, row, column]
        M = p.M.to(W.dtype)[:, None]
        return (blocks + blocks @ M + M).transpose(1, 2).flatten(2, 3).flatten(0, 1)
