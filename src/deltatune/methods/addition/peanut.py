"""PEANuT: the change of a weight is computed by a small network from the weight itself (Zhong et al., 2024, arXiv:2410.01870).

    W' = W + scale B h        A: [rank, d_out]   B: [d_out, rank]   E_i, F_i: [rank, rank]
    h_0 = f(A W),   h_i = f(E_i h_{i-1}),   then for i = depth .. 1:  h = f(F_i h) + h_{i-1}        f is relu

B starts at zero, so the delta starts neutral; the others start uniform (Kaiming). Parameters:
2 rank d_out + 2 depth rank^2 a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core.leaf import KaimingUniform, Leaf
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class PEANuT(OnLinear):
    """Weight-aware network: W' = W + scale B h(A W) (Zhong et al., 2024)."""

    rank: int = 32
    depth: int = 0
    scale: float = 1.0

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)
        check_least(self, 0, depth=self.depth)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        r, start = self.rank, KaimingUniform()
        outer = {"A": Leaf((r, site.d_out), start), "B": Leaf((site.d_out, r))}
        inner = Leaf((self.depth, r, r), start)
        return {**outer, "E": inner, "F": inner} if self.depth else outer

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + self.scale * (p.B @ self._inner(p, W)).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + (x.to(y.dtype) @ self._inner(p, base.weight).mT @ p.B.mT) * self.scale

    def _inner(self, p: Any, W: Tensor) -> Tensor:
        """Return h [rank, d_in]."""
        h = torch.relu(p.A @ W.to(p.A.dtype))
        before = []
        for i in range(self.depth):
            before.append(h)
            h = torch.relu(p.E[i] @ h)
        for i in range(self.depth):
            h = torch.relu(p.F[i] @ h) + before[-1 - i]
        return h
