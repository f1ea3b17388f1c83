"""DoRA: magnitude and direction of a weight, the direction changed by LoRA (Liu et al., 2024, arXiv:2402.09353).

    W' = m (W + V) / |W + V|        V = (alpha / rank) B A   A: [rank, d_in]   B: [d_out, rank]   m: [d_out]

|.| is the norm of each row, a constant to the gradient (section 4.3 of the paper). m starts as |W|, A uniform (Kaiming)
and B at zero, so the delta starts neutral. Parameters: rank (d_in + d_out) + d_out a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, KaimingUniform, Leaf, Shape, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._low_rank import routed
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class RowNorms(Init):
    """The norm of each row of the site's weight."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return given.weight.norm(dim=1)


@dataclass(frozen=True)
class DoRA(OnLinear):
    """Weight-decomposed low-rank adaptation: W' = m (W + V) / |W + V|, V = (alpha / rank) B A (Liu et al., 2024)."""

    rank: int = 8
    alpha: float = 16.0
    init: Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        A, B = Leaf((self.rank, site.d_in), self.init), Leaf((site.d_out, self.rank), Zeros())
        return {"A": A, "B": B, "m": Leaf((site.d_out,), RowNorms())}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        V = W + (self.alpha / self.rank) * (p.B @ p.A).to(W.dtype)
        return (p.m.to(W.dtype) / V.detach().norm(dim=1))[:, None] * V

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        bias = base.bias
        Wx = y if bias is None else y - bias
        Vx = routed(x, Wx, p.A, p.B, self.alpha / self.rank)
        new = Vx * (p.m / self._norms(p, base.weight).to(y.dtype))
        return new if bias is None else new + bias

    @torch.no_grad()
    def _norms(self, p: Any, W: Tensor) -> Tensor:
        # |W + V|^2 = |W|^2 + 2 <W, V> + |V|^2 by rows, each term without a matrix of the weight's size.
        precise = torch.promote_types(W.dtype, torch.float32)
        A, Bt = p.A.to(W.dtype), p.B.mT.to(precise) * (self.alpha / self.rank)
        cross = ((A @ W.mT).to(precise) * Bt).sum(0)
        own = (((A @ A.mT).to(precise) @ Bt) * Bt).sum(0)
        return (torch.linalg.vector_norm(W, dim=1, dtype=precise).square() + 2 * cross + own).sqrt()
