"""Low-rank adapter: an adapter whose matrices are products (Karimi Mahabadi et al., 2021, arXiv:2106.04647, section 4).

    h' = h + f(h (D1 D2)^T + d) (U1 U2)^T + u        D1: [size, rank]   D2: [rank, d]   U1: [d, rank]   U2: [rank, size]

f is gelu (tanh form). D1, D2 and U2 start Glorot uniform and U1 at zero, so that the delta starts exactly neutral; the
paper starts U1 as the others (`up=XavierUniform()`). Biases start at zero. Parameters: 2 rank (d + size) + size + d a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Init, Leaf, XavierUniform, Zeros
from deltatune.core.method import OnStream
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class LowRankAdapter(OnStream):
    """Low-rank adapter: h' = h + f(h (D1 D2)^T + d) (U1 U2)^T + u (Karimi Mahabadi et al., 2021)."""

    size: int = 24
    rank: int = 1
    up: Init = Zeros()

    where = "{attn.o,cross.o?,ffn.down}:out"

    def __post_init__(self) -> None:
        check_least(self, size=self.size, rank=self.rank)
        if self.rank > self.size:
            raise DeltaTuneError(
                f"LowRankAdapter(rank={self.rank}) exceeds its size={self.size}; write a rank of at most {self.size}."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        d, m, r, start = site.width, self.size, self.rank, XavierUniform()
        down = {"D1": Leaf((m, r), start), "D2": Leaf((r, d), start), "d": Leaf((m,))}
        return {**down, "U1": Leaf((d, r), self.up), "U2": Leaf((r, m), start), "u": Leaf((d,))}

    def stream(self, p: Any, h: Tensor) -> Tensor:
        inner = F.gelu(h @ p.D2.mT @ p.D1.mT + p.d, approximate="tanh")
        return h + inner @ p.U2.mT @ p.U1.mT + p.u
