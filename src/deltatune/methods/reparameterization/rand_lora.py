"""RandLoRA: a change of full rank, as scaled sums of random low-rank ones (Albert et al., 2025, arXiv:2502.00987).

    W' = W + (alpha / rank) sum_j B_j diag(l_j) A diag(g_j)        j = 1..n   n = min(d_in, d_out) / rank, rounded up

for d_in <= d_out, and its transpose otherwise: with m and M the smaller and the larger width, A: [rank, m] and
B: [n, M, rank] are uniform with variance 1, shared by all sites of the same widths, not trained, and come back from the
seed. l: [n, rank] starts at zero, so the delta starts neutral, and g: [n, m] at 1 / max(n, m). alpha = 20 rank unless
written. Parameters: n (rank + m) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Constant, Leaf, Uniform
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._low_rank import changed, routed
from deltatune.methods._shared import find, shared
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class RandLoRA(OnLinear):
    """Full-rank adaptation by random bases: W' = W + (alpha / rank) sum_j B_j diag(l_j) A diag(g_j) (Albert et al., 2025)."""

    rank: int = 32
    alpha: float | None = None

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        small, large = sorted((site.d_in, site.d_out))
        n, random = -(-small // self.rank), Uniform(sqrt(3))
        return {
            **shared("A", (self.rank, small), random),
            **shared("B", (n, large, self.rank), random),
            "l": Leaf((n, self.rank)),
            "g": Leaf((n, small), Constant(1 / max(n, small))),
        }

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return changed(W, *self._factors(p, *W.shape), self._scale)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return routed(x, y, *self._factors(p, y.shape[-1], x.shape[-1]), self._scale)

    @property
    def _scale(self) -> float:
        return 20.0 if self.alpha is None else self.alpha / self.rank

    def _factors(self, p: Any, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
        # The sum over j of products is one product of factors of rank n x rank.
        narrow = (p.l[:, :, None] * find(p, "A") * p.g[:, None]).flatten(0, 1)
        wide = find(p, "B").permute(1, 0, 2).flatten(1)
        return (narrow, wide) if d_in <= d_out else (wide.mT, narrow.mT)
