"""DEFT: a subspace of a layer's output is taken out and put in anew (Kumar et al., 2025, arXiv:2509.22793).

    W' = (I - P relu(P)^T) W + scale P R        P: [d_out, rank]   R: [rank, d_in]        scale = alpha / rank

with the relu of the published code, written from its start P_0 (N(0, 0.02^2), regenerated from the seed) and
R_0 = relu(P_0)^T W / scale, where W' = W:

    W' = W + P ((relu(P_0) - relu(P))^T W + scale S)        P = P_0 + D        R = R_0 + S

so that the leaves D and S start at zero and nothing made from W has to be kept. `alpha=0` means scale 1. Parameters:
rank (d_in + d_out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Init, Leaf, Normal
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class DEFT(OnLinear):
    """Decompositional finetuning: W' = (I - P relu(P)^T) W + scale P R (Kumar et al., 2025)."""

    rank: int = 8
    alpha: float = 0.0
    init: Init = Normal(0.02)

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)
        check_least(self, 0, alpha=self.alpha)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        tall = (site.d_out, self.rank)
        return {"P0": Leaf(tall, self.init, trained=False), "D": Leaf(tall), "S": Leaf((self.rank, site.d_in))}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        P = p.P0 + p.D
        return W + (P @ ((p.P0.relu() - P.relu()).mT @ W.to(P.dtype) + self._scale * p.S)).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        P, z = p.P0 + p.D, y if base.bias is None else y - base.bias  # z = x W^T
        inside = z @ (p.P0.relu() - P.relu()) + x.to(y.dtype) @ p.S.mT * self._scale
        return y + inside @ P.mT

    @property
    def _scale(self) -> float:
        return self.alpha / self.rank if self.alpha else 1.0
