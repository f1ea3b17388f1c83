"""LoKr: a change of a weight that is a Kronecker product with a low-rank factor (Yeh et al., 2024, arXiv:2309.14859).

    W' = W + (alpha / rank) C kron (B A)        C: [j, m]   B: [k, rank]   A: [rank, n]   j k = d_out   m n = d_in

j and m are `factor` where it divides the width, else the largest divisor below it and below the square root (-1: below
the square root alone). A second factor too small for the rank, max(k, n) <= 2 rank, is one matrix D: [k, n] instead.
C starts at zero and the others uniform (Kaiming), so the delta starts neutral. Parameters: j m + rank (k + n), or
j m + k n, a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core.leaf import Init, KaimingUniform, Leaf, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._kronecker import kron_linear, split
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class LoKr(OnLinear):
    """Low-rank Kronecker product: W' = W + (alpha / rank) C kron (B A) (Yeh et al., 2024)."""

    rank: int = 8
    alpha: float = 8.0
    factor: int = -1
    init: Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)
        if self.factor == 0 or self.factor < -1:
            raise DeltaTuneError(
                f"LoKr(factor={self.factor}) splits no width; write a divisor, or -1 for the square root."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        (j, k), (m, n) = split(site.d_out, self.factor), split(site.d_in, self.factor)
        first = {"C": Leaf((j, m), Zeros())}
        if self._whole(k, n):
            return first | {"D": Leaf((k, n), self.init)}
        return first | {"A": Leaf((self.rank, n), self.init), "B": Leaf((k, self.rank), self.init)}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        factors = self._factors(p, *W.shape)
        D = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
        return W + (self.alpha / self.rank) * torch.kron(p.C, D).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        factors = self._factors(p, y.shape[-1], x.shape[-1])
        return y + kron_linear(x.to(y.dtype), p.C, *factors) * (self.alpha / self.rank)

    def _whole(self, k: int, n: int) -> bool:
        return 2 * self.rank >= max(k, n)

    def _factors(self, p: Any, d_out: int, d_in: int) -> tuple[Tensor, ...]:
        whole = self._whole(split(d_out, self.factor)[1], split(d_in, self.factor)[1])
        return (p.D,) if whole else (p.B, p.A)
