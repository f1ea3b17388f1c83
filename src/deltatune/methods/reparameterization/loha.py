"""LoHa: a weight changes by the Hadamard product of two low-rank matrices (Hyeon-Woo et al., 2022, arXiv:2108.06098).

    W' = W + (alpha / rank) (B_1 A_1) * (B_2 A_2)        A_i: [rank, d_in]   B_i: [d_out, rank]   * elementwise

so the change has a rank of up to rank^2. B_1, A_1 and B_2 start uniform (Kaiming), A_2 at zero, so the delta starts
neutral. Parameters: 2 rank (d_in + d_out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Init, KaimingUniform, Leaf, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class LoHa(OnLinear):
    """Low-rank Hadamard product: W' = W + (alpha / rank) (B_1 A_1) * (B_2 A_2) (Hyeon-Woo et al., 2022)."""

    rank: int = 8
    alpha: float = 8.0
    init: Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        down, up = (self.rank, site.d_in), (site.d_out, self.rank)
        return {
            "A1": Leaf(down, self.init),
            "B1": Leaf(up, self.init),
            "A2": Leaf(down, Zeros()),
            "B2": Leaf(up, self.init),
        }

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + (self.alpha / self.rank) * ((p.B1 @ p.A1) * (p.B2 @ p.A2)).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        # A product of two rank-r matrices is one of rank r^2, whose factors are all products of rows and of columns.
        A = (p.A1[:, None] * p.A2).flatten(0, 1)
        B = (p.B1[:, :, None] * p.B2[:, None]).flatten(1)
        return y + (x.to(y.dtype) @ A.mT @ B.mT) * (self.alpha / self.rank)
