"""DiReFT: LoReFT without orthogonality and without the difference, a low-rank map of the hidden state (Wu et al., 2024,
arXiv:2404.03592).

    h' = h + W_2^T (W_1 h + b)        W_1, W_2: [rank, d]   b: [rank]

W_1 starts uniform (Kaiming), W_2 and b at zero, so the delta starts neutral. Every position is edited;
`AtPositions(DiReFT(), first=4)` edits some. Parameters: 2 rank d + rank a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Init, KaimingUniform, Leaf, Zeros
from deltatune.core.method import OnStream
from deltatune.core.site import Site
from deltatune.methods._reft import check_width
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class DiReFT(OnStream):
    """Direct representation fine-tuning: h' = h + W_2^T (W_1 h + b) (Wu et al., 2024)."""

    rank: int = 4
    init: Init = Zeros()

    where = "block:out"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_width(self, self.rank, site)
        shape = (self.rank, site.width)
        return {"W1": Leaf(shape, KaimingUniform()), "W2": Leaf(shape, self.init), "b": Leaf((self.rank,))}

    def stream(self, p: Any, h: Tensor) -> Tensor:
        return h + F.linear(h, p.W1, p.b) @ p.W2
