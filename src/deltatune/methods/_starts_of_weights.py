"""Starts of LoRA that the site's weight gives, or chance: PiSSA, OLoRA, MiCA, orthogonal factors, LoftQ.

Everywhere scale = alpha / rank, and U S V^T is the singular value decomposition of W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._low_rank import decomposed, halves, largest, principal
from deltatune.methods._nf4 import nf4
from deltatune.methods._starts import Computed, Start, StartFactor


@dataclass(frozen=True)
class PiSSA(Computed):
    """The principal part of W: B A scale = U_r S_r V_r^T, half of S in each (Meng et al., 2024, arXiv:2404.02948)."""

    def factors(self, rank: int, scale: float, given: Given) -> tuple[Tensor, Tensor]:
        U, S, Vt = principal(given, rank)
        return halves(U, S / scale, Vt)


@dataclass(frozen=True)
class OLoRA(Computed):
    """The QR decomposition of W: B = the first columns of Q, A = the first rows of R (Büyükakyüz, 2024, arXiv:2406.01775)."""

    def factors(self, rank: int, scale: float, given: Given) -> tuple[Tensor, Tensor]:
        Q, R = torch.linalg.qr(given.weight)
        return R[:rank], Q[:, :rank]


@dataclass(frozen=True)
class MiCA(Computed):
    """B = the left singular vectors of W with the smallest singular values, untrained; A = 0 (2026, arXiv:2604.01694)."""

    def leaves(self, site: Site, rank: int, scale: float) -> dict[str, Leaf]:
        B = Leaf((site.d_out, rank), StartFactor(self, "B", scale), trained=False, stored=True)
        return {"A": Leaf((rank, site.d_in)), "B": B}

    def factors(self, rank: int, scale: float, given: Given) -> tuple[Tensor, Tensor]:
        U, _, _ = decomposed(given)
        return torch.zeros(rank, given.site.d_in), U[:, -rank:]

    def unfold(self, p: Any) -> Any:
        return p


@dataclass(frozen=True)
class OrthogonalFactor(Init):
    """A = Q_1^T N_1 / 10 or B = N_2 Q_2 / 10 of `OrthogonalStart`, each with an N of its own."""

    factor: Literal["A", "B"]

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        rank = shape[0] if self.factor == "A" else shape[1]
        Q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=Generator().manual_seed(rank)))
        if self.factor == "A":
            return Q[0::2].mT @ torch.randn(rank // 2, shape[1], generator=generator) / 10
        return torch.randn(shape[0], rank // 2, generator=generator) @ Q[1::2] / 10


@dataclass(frozen=True)
class OrthogonalStart(Start):
    """Both factors random and B A = 0: A = Q_1^T N_1 / 10 and B = N_2 Q_2 / 10 (as in peft, after datta0, 2024).

    N_1 and N_2 are standard normal; Q_1 and Q_2 are the odd and even rows of one orthogonal matrix, fixed by the rank.
    """

    def leaves(self, site: Site, rank: int, scale: float) -> dict[str, Leaf]:
        if rank % 2:
            raise DeltaTuneError(f"OrthogonalStart halves the rank; rank={rank} is odd, write {rank + 1}.")
        A, B = OrthogonalFactor("A"), OrthogonalFactor("B")
        return {"A": Leaf((rank, site.d_in), A), "B": Leaf((site.d_out, rank), B)}


@dataclass(frozen=True)
class LoftQ(Computed):
    """What rounding W to 4 bits loses: scale B A ~ W - Q, where Q ~ W - scale B A is NF4 (Li et al., 2023, arXiv:2310.08659).

    `steps` times in turn Q = nf4(W - scale B A) and scale B A = the rank-r part of W - Q. The delta belongs to the
    backbone of the Q of `rounded`, whose function it brings back to that of W.
    """

    steps: int = 5
    block: int = 64
    breaks = {"identity": "its start makes up for a backbone rounded to 4 bits; on an exact one it is a change"}  # noqa: RUF012

    def leaves(self, site: Site, rank: int, scale: float) -> dict[str, Leaf]:
        leaves = super().leaves(site, rank, scale)
        return {name: leaves[name] for name in ("A", "B")}

    def factors(self, rank: int, scale: float, given: Given) -> tuple[Tensor, Tensor]:
        _, product = self._alternate(given.weight, rank)
        U, S, Vt = largest(product, rank)
        return halves(U, S / scale, Vt)

    def rounded(self, W: Tensor, rank: int) -> Tensor:
        """Return Q, the weight [d_out, d_in] rounded to 4 bits that the factors of this rank make up for."""
        return self._alternate(W, rank)[0]

    def _alternate(self, W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        Q, product = W, torch.zeros_like(W)
        for _ in range(self.steps):
            Q = nf4(W - product, self.block)
            U, S, Vt = largest(W - Q, rank)
            product = (U * S) @ Vt
        return Q, product

    def unfold(self, p: Any) -> Any:
        return p
