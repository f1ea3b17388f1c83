"""TinyLoRA: a vector that mixes random matrices between the principal singular vectors (Morris et al., 2026, arXiv:2602.04118).

    W' = W + B (sum_i v_i P_i) A        B A = U_r S_r V_r^T   B: [d_out, rank]   A: [rank, d_in]   P: [size, rank, rank]

A and B, half of the singular values in each, are not trained and travel with the weights; P, N(0, 1/rank), comes back
from the seed. v starts at zero, so the delta starts neutral. `share="delta"` trains one v for all sites.
The default place is every linear layer, as in the paper.
Parameters: size a site, or size in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Normal, Shape
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._low_rank import changed, halves, principal, routed
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class Half(Init):
    """A = sqrt(S_r) V_r^T or B = U_r sqrt(S_r) of the site's weight."""

    factor: Literal["A", "B"]

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        A, B = halves(*principal(given, shape[0] if self.factor == "A" else shape[1]))
        return A if self.factor == "A" else B


@dataclass(frozen=True)
class TinyLoRA(OnLinear):
    """Tiny LoRA: W' = W + B (sum_i v_i P_i) A (Morris et al., 2026)."""

    rank: int = 2
    size: int = 64
    share: Literal["site", "delta"] = "site"

    where = "{attn.{q,k,v,o},cross.{q,k,v,o}?,ffn.{gate?,up,down}}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank, size=self.size)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        return {
            "A": Leaf((self.rank, site.d_in), Half("A"), trained=False, stored=True),
            "B": Leaf((site.d_out, self.rank), Half("B"), trained=False, stored=True),
            "P": Leaf((self.size, self.rank, self.rank), Normal(1 / sqrt(self.rank)), trained=False),
            "v": Leaf((self.size,), scope=self.share),
        }

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return changed(W, torch.einsum("i,ijk->jk", p.v, p.P) @ p.A, p.B)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return routed(x, y, torch.einsum("i,ijk->jk", p.v, p.P) @ p.A, p.B)
