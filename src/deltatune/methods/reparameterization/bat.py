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
from deltatune.methods._sizes import check_divides, check_least, fitting

LARGEST = 64  # the size that a block has by default where the widths allow it


@dataclass(frozen=True)
class Bat(OnLinear):
    """Block affine transformation: W'_ij = W_ij + W_ij M_i + M_i (Kang and Yin, 2024)."""

    block: int | None = None

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, block=1 if self.block is None else self.block)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        block = self.block or fitting(LARGEST, site.d_in, site.d_out)
        for width in (site.d_in, site.d_out):
            check_divides(self, "block", block, width, site)
        return {"M": Leaf((site.d_out // block, block, block))}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        block = p.M.shape[-1]
        blocks = W.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)  # [i, j, row, column]
        M = p.M.to(W.dtype)[:, None]
        return (blocks + blocks @ M + M).transpose(1, 2).flatten(2, 3).flatten(0, 1)
