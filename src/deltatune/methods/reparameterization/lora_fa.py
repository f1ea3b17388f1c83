"""LoRA-FA: LoRA whose A stays as it is drawn (Zhang et al., 2023, arXiv:2308.03303).

    W' = W + (alpha / rank) B A        A: [rank, d_in], not trained   B: [d_out, rank]

Training keeps x A^T [rank] instead of x [d_in] for the backward pass. A is uniform (Kaiming) and comes back from the seed,
B starts at zero, so the delta starts neutral. Parameters: rank d_out a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Init, KaimingUniform, Leaf, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._low_rank import changed, routed
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class LoRAFA(OnLinear):
    """Low-rank adaptation with a frozen A: W' = W + (alpha / rank) B A (Zhang et al., 2023)."""

    rank: int = 8
    alpha: float = 16.0
    init: Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        A = Leaf((self.rank, site.d_in), self.init, trained=False)
        return {"A": A, "B": Leaf((site.d_out, self.rank), Zeros())}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return changed(W, p.A, p.B, self.alpha / self.rank)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return routed(x, y, p.A, p.B, self.alpha / self.rank)
