"""PVeRA: VeRA whose hidden vector is drawn from a normal distribution while training (Fillioux et al., 2025, arXiv:2512.07703).

    y' = y + b * (h B^T)        h = mu + e * exp(l / 2)   [mu, l] = d * (x A^T)   e ~ N(0, 1)

A: [2 rank, d_in] and B: [d_out, rank] (uniform, He) are shared by all sites of a width, not trained, and come back from
the seed. d: [2 rank] starts at 0.1 and b: [d_out] at zero, so the delta starts neutral. e is drawn once a training step
and site, and is zero outside training: then, and in the weight, the mean alone counts. Parameters: 2 rank + d_out a site.

d and b learn `rate` times as fast as the recipe says, as those of VeRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Constant, Leaf, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._low_rank import changed
from deltatune.methods._shared import HeUniform, find, shared
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class PVeRA(OnLinear):
    """Probabilistic VeRA: y' = y + b * (h B^T), h ~ N(mu(x), exp(l(x))) (Fillioux et al., 2025)."""

    rank: int = 256
    start: float = 0.1
    rate: float = 25.0

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        r = self.rank
        A, B = shared("A", (2 * r, site.d_in), HeUniform()), shared("B", (site.d_out, r), HeUniform())
        d = Leaf((2 * r,), Constant(self.start), rate=self.rate)
        own = {"d": d, "b": Leaf((site.d_out,), Zeros(), rate=self.rate)}
        return {**A, **B, **own, "e": Leaf((r,), Zeros(), trained=False)}

    def draw(self, p: Any, generator: Generator) -> dict[str, Tensor]:
        return {"e": torch.randn(p.e.shape, generator=generator)}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        A = find(p, "A")[: self.rank]
        return changed(W, p.d[: self.rank, None] * A, p.b[:, None] * find(p, "B"))

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        mean, log = (p.d * (x.to(y.dtype) @ find(p, "A").mT)).chunk(2, -1)
        return y + p.b * ((mean + p.e * torch.exp(log / 2)) @ find(p, "B").mT)
