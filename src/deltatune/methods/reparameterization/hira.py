"""HiRA: a change of a weight that is the weight itself times a low-rank matrix (Huang et al., 2025, ICLR).

    W' = W + W * (B A)        A: [rank, d_in]   B: [d_out, rank]   * elementwise

so the change has the rank of W. A starts uniform (Kaiming), B at zero, so the delta starts neutral. Parameters:
rank (d_in + d_out) a site.
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
class HiRA(OnLinear):
    """Hadamard high-rank adaptation: W' = W + W * (B A) (Huang et al., 2025)."""

    rank: int = 32
    init: Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        return {"A": Leaf((self.rank, site.d_in), self.init), "B": Leaf((site.d_out, self.rank), Zeros())}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + W * (p.B @ p.A).to(W.dtype)
