"""GLoRA: a weight and a bias, both scaled and shifted (Chavan et al., 2023, arXiv:2306.07967).

    W' = W + W * (B_s A_s) + B_t A_t        b' = b + b * d + e        A_s, A_t: [rank, d_in]   B_s, B_t: [d_out, rank]

d and e: [d_out] are there where the layer has a bias. The paper's further term W c of the bias is a vector that e can
be, so it has no leaf here, and its search over smaller forms of each term is left to studies. A_s and A_t start uniform
(Kaiming), the rest at zero, so the delta starts neutral. Parameters: 2 rank (d_in + d_out), and 2 d_out with a bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Init, KaimingUniform, Leaf, Zeros
from deltatune.core.method import OnLinear
from deltatune.core.site import Site
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class GLoRA(OnLinear):
    """Generalized LoRA: W' = W + W * (B_s A_s) + B_t A_t, b' = b + b * d + e (Chavan et al., 2023)."""

    rank: int = 8
    init: Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        down, up = Leaf((self.rank, site.d_in), self.init), Leaf((site.d_out, self.rank), Zeros())
        shift = Leaf((site.d_out,))
        return {"As": down, "Bs": up, "At": down, "Bt": up} | ({"d": shift, "e": shift} if site.bias else {})

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + W * (p.Bs @ p.As).to(W.dtype) + (p.Bt @ p.At).to(W.dtype)

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        return None if b is None else b + (b * p.d + p.e).to(b.dtype)
