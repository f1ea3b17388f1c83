"""OFT: orthogonal finetuning, the input of a layer is rotated in blocks (Qiu et al., 2023, arXiv:2306.07280).

    W' = W R^T        R = diag(R_1, ..., R_{d_in / block})        R_i = (I - Q_i) (I + Q_i)^-1        Q_i = -Q_i^T

by Cayley's map of Q_i: [block, block], so the angles between neurons are kept. As in OFTv2 (Qiu et al., 2025,
arXiv:2506.19847) x is rotated, never W. A leaf holds the upper triangles of Q_i, row by row; they start at zero, so the
delta starts neutral. With `share` all blocks are one. Parameters: d_in (block - 1) / 2 a site, or block (block - 1) / 2
shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Leaf
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._rotate import cayley, rotate, skew, triangle
from deltatune.methods._sizes import check_divides, check_least


@dataclass(frozen=True)
class OFT(OnLinear):
    """Orthogonal finetuning: W' = W R^T with R block-diagonal and orthogonal (Qiu et al., 2023)."""

    block: int = 32
    share: bool = False

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, 2, block=self.block)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_divides(self, "block", self.block, site.d_in, site)
        return {"Q": Leaf((1 if self.share else site.d_in // self.block, triangle(self.block)))}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return rotate(W, self._rotation(p, W).mT)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        x = x.to(y.dtype)
        return y + F.linear(rotate(x, self._rotation(p, x)) - x, base.weight)

    def _rotation(self, p: Any, like: Tensor) -> Tensor:
        return cayley(skew(p.Q, self.block)).to(like.dtype)
