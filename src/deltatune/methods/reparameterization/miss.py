"""MiSS: one shard of a matrix, shared by all blocks of a weight's columns (Kang and Yin, 2024, arXiv:2409.15371).

    W' = W + (M^T M^T ...)        M: [rank, d_out], tiled over the d_in columns and cut at the last

so the change of an output is M^T times the sum of the input's blocks of `rank`. With `columns` M is [rank, columns],
tiled over the outputs too. M starts at zero, so the delta starts neutral. Parameters: rank d_out, or rank columns, a
site. Bone, its first name, is a preset: `bone()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.delta import Delta
from deltatune.core.leaf import Leaf
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_divides, check_least


@dataclass(frozen=True)
class MiSS(OnLinear):
    """Matrix shard sharing: W' = W + (M^T M^T ...) (Kang and Yin, 2024); `columns=0` means all outputs."""

    rank: int = 64
    columns: int = 0

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)
        check_least(self, 0, columns=self.columns)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        if self.rank > site.d_in:
            raise DeltaTuneError(f"MiSS(rank={self.rank}) exceeds the width {site.d_in} of the input of {site.path!r}.")
        columns = self.columns or site.d_out
        check_divides(self, "columns", columns, site.d_out, site)
        return {"M": Leaf((self.rank, columns))}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        d_out, d_in = W.shape
        return W + p.M.mT.tile(d_out // p.M.shape[1], -(-d_in // self.rank))[:, :d_in].to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        blocks = F.pad(x.to(y.dtype), (0, -x.shape[-1] % self.rank)).unflatten(-1, (-1, self.rank))
        return y + (blocks.sum(-2) @ p.M).tile(y.shape[-1] // p.M.shape[1])


def bone(rank: int = 64) -> Delta:
    """Bone, the name under which MiSS was first published (Kang, 2024, arXiv:2409.15371)."""
    return MiSS(rank).at(MiSS.where)
