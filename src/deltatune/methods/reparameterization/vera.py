"""VeRA: vectors that scale random matrices which all sites share (Kopiczko et al., 2023, arXiv:2310.11454).

    W' = W + diag(b) B diag(d) A        A: [rank, d_in], B: [d_out, rank], shared   d: [rank]   b: [d_out]

A and B (uniform, He) are not trained and come back from the seed: one A for each d_in and one B for each d_out, where
peft cuts those of narrow sites from the widest. d starts at 0.1 and b at zero, so the delta starts neutral.
Parameters: rank + d_out a site.

d and b learn `rate` times as fast as the recipe says: the authors train them at 1e-2 where LoRA has 4e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Constant, Leaf, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._low_rank import changed, routed
from deltatune.methods._shared import HeUniform, find, shared
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class VeRA(OnLinear):
    """Vector-based random matrix adaptation: W' = W + diag(b) B diag(d) A (Kopiczko et al., 2023)."""

    rank: int = 256
    start: float = 0.1
    rate: float = 25.0

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        A, B = shared("A", (self.rank, site.d_in), HeUniform()), shared("B", (site.d_out, self.rank), HeUniform())
        d = Leaf((self.rank,), Constant(self.start), rate=self.rate)
        return {**A, **B, "d": d, "b": Leaf((site.d_out,), Zeros(), rate=self.rate)}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return changed(W, p.d[:, None] * find(p, "A"), p.b[:, None] * find(p, "B"))

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return routed(x, y, p.d[:, None] * find(p, "A"), p.b[:, None] * find(p, "B"))
