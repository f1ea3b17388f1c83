"""LoRA: a low-rank change of a weight (Hu et al., 2021, arXiv:2106.09685).

    W' = W + (alpha / rank) B A        A: [rank, d_in]   B: [d_out, rank]

A starts uniform (Kaiming), B starts at zero, so the delta starts neutral. Parameters: rank (d_in + d_out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Init, KaimingUniform, Leaf, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class LoRA(OnLinear):
    """Low-rank adaptation: W' = W + (alpha / rank) B A (Hu et al., 2021)."""

    rank: int = 8
    alpha: float = 16.0
    init: Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise DeltaTuneError(f"LoRA(rank={self.rank}) has no rank; write a rank of at least 1.")

    def leaves(self, site: Site) -> dict[str, Leaf]:
        if self.rank > min(site.d_in, site.d_out):
            raise DeltaTuneError(
                f"LoRA(rank={self.rank}) exceeds the dimensions of {site.path!r}: {site.d_out} x {site.d_in}."
            )
        return {"A": Leaf((self.rank, site.d_in), self.init), "B": Leaf((site.d_out, self.rank), Zeros())}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + (self.alpha / self.rank) * (p.B @ p.A).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + (x.to(y.dtype) @ p.A.mT @ p.B.mT) * (self.alpha / self.rank)
