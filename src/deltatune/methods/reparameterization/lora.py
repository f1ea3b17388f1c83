"""LoRA: a low-rank change of a weight (Hu et al., 2021, arXiv:2106.09685).

    W' = W + (alpha / rank) B A        A: [rank, d_in]   B: [d_out, rank]

A starts uniform (Kaiming), B starts at zero, so the delta starts neutral; `init` takes any other initialiser of A, or a
start of both factors such as `PiSSA()`. Parameters: rank (d_in + d_out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Init, KaimingUniform, Leaf
from deltatune.core.method import Base, Law, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._low_rank import changed, routed
from deltatune.methods._sizes import check_rank
from deltatune.methods._starts import LoRAPlus, Start, as_start


@dataclass(frozen=True)
class LoRA(OnLinear):
    """Low-rank adaptation: W' = W + (alpha / rank) B A (Hu et al., 2021)."""

    rank: int = 8
    alpha: float = 16.0
    init: Start | Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"
    batched = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise DeltaTuneError(f"LoRA(rank={self.rank}) has no rank; write a rank of at least 1.")

    @property
    def breaks(self) -> dict[Law, str]:  # type: ignore[override]
        """The laws that the start breaks."""
        return as_start(self.init).breaks

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        return as_start(self.init).leaves(site, self.rank, self.alpha / self.rank)

    def unfold(self, p: Any) -> Any:
        return as_start(self.init).unfold(p)

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return changed(W, p.A, p.B, self.alpha / self.rank)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return routed(x, y, p.A, p.B, self.alpha / self.rank, base)


def rslora(rank: int = 8, alpha: float = 16.0, init: Start | Init = LoRA.init) -> LoRA:
    """LoRA at the scale alpha / sqrt(rank), at which the change does not shrink with the rank (Kalajdzievski, 2023, arXiv:2312.03732)."""
    return LoRA(rank, alpha * sqrt(rank), init)


def loraplus(rank: int = 8, alpha: float = 16.0, ratio: float = 16.0) -> LoRA:
    """LoRA whose B learns `ratio` times as fast as its A (Hayou et al., 2024, arXiv:2402.12354)."""
    return LoRA(rank, alpha, LoRAPlus(ratio))
