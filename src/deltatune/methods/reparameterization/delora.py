"""DeLoRA: LoRA whose directions and strength are decoupled (Bini et al., 2025, arXiv:2503.18225).

    W' = W + (lambda / rank) sum_i b_i a_i^T / (|b_i| |a_i|) diag(n)        n_j = |W[:, j]|

with a_i the rows of A: [rank, d_in] and b_i the columns of B: [d_out, rank], so that the change is bounded by lambda. A
starts uniform (Kaiming), B at zero and lambda, trained, at `strength`: the delta starts neutral. Norms are held above
1e-4. n: [d_in] is stored, as it comes from the backbone. Parameters: rank (d_in + d_out) + 1 a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from deltatune.core.leaf import Constant, Given, Init, KaimingUniform, Leaf, Shape, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class ColumnNorms(Init):
    """The norm of each column of the site's weight."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return given.weight.norm(dim=0)


@dataclass(frozen=True)
class DeLoRA(OnLinear):
    """Decoupled LoRA: W' = W + (lambda / rank) sum_i b_i a_i^T / (|b_i| |a_i|) diag(n) (Bini et al., 2025)."""

    rank: int = 8
    strength: float = 15.0
    init: Init = KaimingUniform()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        return {
            "A": Leaf((self.rank, site.d_in), self.init),
            "B": Leaf((site.d_out, self.rank), Zeros()),
            "strength": Leaf((1,), Constant(self.strength)),
            "norms": Leaf((site.d_in,), ColumnNorms(), trained=False, stored=True),
        }

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + ((p.B * self._scales(p)) @ p.A * p.norms).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + ((x.to(y.dtype) * p.norms) @ p.A.mT * self._scales(p)) @ p.B.mT

    def _scales(self, p: Any) -> Tensor:
        return p.strength / self.rank / (p.A.norm(dim=1).clamp(min=1e-4) * p.B.norm(dim=0).clamp(min=1e-4))
