"""KronA: a change of a weight that is one Kronecker product (Edalati et al., 2022, arXiv:2212.10650).

    W' = W + scale A kron B        A: [a_out, a_in]   B: [b_out, b_in]   a_out b_out = d_out   a_in b_in = d_in

a_out and a_in are `factor` where it divides the width, else the largest divisor below it and below the square root (-1:
below the square root alone, the fewest parameters). A starts uniform (Kaiming) and B at zero, so the delta starts
neutral. Parameters: a_out a_in + b_out b_in a site.
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


@dataclass(frozen=True)
class KronA(OnLinear):
    """Kronecker adapter: W' = W + scale A kron B (Edalati et al., 2022)."""

    factor: int = -1
    scale: float = 1.0
    init: Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        if self.factor == 0 or self.factor < -1:
            raise DeltaTuneError(
                f"KronA(factor={self.factor}) splits no width; write a divisor, or -1 for the square root."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        (a_out, b_out), (a_in, b_in) = split(site.d_out, self.factor), split(site.d_in, self.factor)
        return {"A": Leaf((a_out, a_in), self.init), "B": Leaf((b_out, b_in), Zeros())}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + self.scale * torch.kron(p.A, p.B).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + kron_linear(x.to(y.dtype), p.A, p.B) * self.scale
