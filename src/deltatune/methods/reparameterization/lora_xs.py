"""LoRA-XS: a small matrix between the principal singular vectors of a weight (Balazy et al., 2024, arXiv:2405.17604).

    W' = W + (U_r S_r) R V_r^T        W = U S V^T   R: [rank, rank]

U_r S_r [d_out, rank] and V_r^T [rank, d_in] are not trained and travel with the weights. R starts at zero, so that the
delta starts exactly neutral; the paper starts it near zero (`init=Normal(1e-5)`). Parameters: rank^2 a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._low_rank import changed, principal, routed
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class Principal(Init):
    """U_r S_r or V_r^T of the site's weight, r being the leaf's smaller dimension."""

    side: Literal["U S", "V"]

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        U, S, Vt = principal(given, shape[1] if self.side == "U S" else shape[0])
        return U * S if self.side == "U S" else Vt


@dataclass(frozen=True)
class LoRAXS(OnLinear):
    """Extremely small LoRA: W' = W + (U_r S_r) R V_r^T (Balazy et al., 2024)."""

    rank: int = 16
    init: Init = Zeros()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        return {
            "A": Leaf((self.rank, site.d_in), Principal("V"), trained=False, stored=True),
            "B": Leaf((site.d_out, self.rank), Principal("U S"), trained=False, stored=True),
            "R": Leaf((self.rank, self.rank), self.init),
        }

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return changed(W, p.R @ p.A, p.B)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return routed(x, y, p.R @ p.A, p.B)
