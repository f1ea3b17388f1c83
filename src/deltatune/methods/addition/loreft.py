"""LoReFT: a hidden state is edited in a low-rank subspace (Wu et al., 2024, arXiv:2404.03592).

    h' = h + R^T (W h + b - R h)        W, R: [rank, d]   b: [rank]   R R^T = I

R is the orthonormal basis of a leaf's rows (QR); the leaf is saved. It starts with orthonormal rows, W and b uniform
(Kaiming), as in the authors' code. Every position is edited, those of generated tokens too: what has no positions holds
for every backbone and use. The paper's choice of positions is `AtPositions(LoReFT(), first=4)`. Parameters: 2 rank d + rank
a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import KaimingUniform, Leaf, Orthogonal, Uniform
from deltatune.core.method import Bag, OnStream
from deltatune.core.site import Site
from deltatune.methods._reft import check_width, orthonormal_rows
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class LoReFT(OnStream):
    """Low-rank representation fine-tuning: h' = h + R^T (W h + b - R h), R with orthonormal rows (Wu et al., 2024)."""

    rank: int = 4

    where = "block:out"
    breaks = {**OnStream.breaks, "identity": "its start replaces a part of h, as in the paper"}  # noqa: RUF012

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_width(self, self.rank, site)
        shape = (self.rank, site.width)
        bias = Leaf((self.rank,), Uniform(site.width**-0.5))
        return {"R": Leaf(shape, Orthogonal()), "W": Leaf(shape, KaimingUniform()), "b": bias}

    def unfold(self, p: Any) -> Any:
        return Bag({**vars(p), "R": orthonormal_rows(p.R)})

    def stream(self, p: Any, h: Tensor) -> Tensor:
        return h + F.linear(h, p.W - p.R, p.b) @ p.R
