"""Starts of LoRA: how its factors A [rank, d_in] and B [d_out, rank] begin, and which of them are trained.

A start whose product is not zero keeps it as untrained A_0 and B_0, so that the delta is neutral and its files hold for
the backbone as it is:

    W' = W + scale (B A - B_0 A_0) = W + scale [B, -B_0] [A; A_0]

Everywhere scale = alpha / rank, and U S V^T is the singular value decomposition of what is named.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, KaimingUniform, Leaf, Shape, Zeros
from deltatune.core.method import Bag, Law
from deltatune.core.site import Site
from deltatune.core.spec import Spec
from deltatune.errors import DeltaTuneError
from deltatune.methods._low_rank import decomposed, halves, largest, principal
from deltatune.methods._nf4 import nf4


class Start(Spec):
    """A start of LoRA's factors; `breaks` as of a method, `needs` as of an initialiser."""

    breaks: ClassVar[dict[Law, str]] = {}
    needs: ClassVar[frozenset[str]] = frozenset()

    def leaves(self, site: Site, rank: int, scale: float) -> dict[str, Leaf]:
        """Declare A, B and what else is kept, by name."""
        raise NotImplementedError

    def unfold(self, p: Any) -> Any:
        """Return the A and B that LoRA computes with."""
        return p


def as_start(init: Init | Start) -> Start:
    """Return a start as it is, and an initialiser as the start of A beside a B of zeros."""
    return init if isinstance(init, Start) else Neutral(init)


@dataclass(frozen=True)
class Neutral(Start):
    """A as `init` says and B = 0 (Hu et al., 2021, arXiv:2106.09685)."""

    init: Init = KaimingUniform()

    def leaves(self, site: Site, rank: int, scale: float) -> dict[str, Leaf]:
        return {"A": Leaf((rank, site.d_in), self.init), "B": Leaf((site.d_out, rank), Zeros())}


@dataclass(frozen=True)
class LoRAPlus(Start):
    """Another start whose B learns `ratio` times as fast as its A (Hayou et al., 2024, arXiv:2402.12354)."""

    ratio: float = 16.0
    start: Init | Start = KaimingUniform()

    @property
    def breaks(self) -> dict[Law, str]:  # type: ignore[override]
        """The laws that the start breaks."""
        return as_start(self.start).breaks

    def leaves(self, site: Site, rank: int, scale: float) -> dict[str, Leaf]:
        leaves = as_start(self.start).leaves(site, rank, scale)
        return {**leaves, "B": replace(leaves["B"], rate=self.ratio)}

    def unfold(self, p: Any) -> Any:
        return as_start(self.start).unfold(p)


class Computed(Start):
    """A start whose factors are computed together, from the site's weight or from evidence."""

    def factors(self, rank: int, scale: float, given: Given) -> tuple[Tensor, Tensor]:
        """Return A [rank, d_in] and B [d_out, rank]."""
        raise NotImplementedError

    def leaves(self, site: Site, rank: int, scale: float) -> dict[str, Leaf]:
        A, B = StartFactor(self, "A", scale), StartFactor(self, "B", scale)
        down, up = (rank, site.d_in), (site.d_out, rank)
        first = {"A0": Leaf(down, A, trained=False, stored=True), "B0": Leaf(up, B, trained=False, stored=True)}
        return {"A": Leaf(down, A), "B": Leaf(up, B), **first}

    def unfold(self, p: Any) -> Any:
        return Bag({"A": torch.cat([p.A, p.A0]), "B": torch.cat([p.B, -p.B0], -1)})


@dataclass(frozen=True)
class StartFactor(Init):
    """One of the two factors that a start computes together."""

    start: Computed
    factor: Literal["A", "B"]
    scale: float

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The evidence that the start needs."""
        return self.start.needs

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        start, rank = self.start, shape[0] if self.factor == "A" else shape[1]
        A, B = given.once((start, rank, self.scale), lambda: start.factors(rank, self.scale, given))
        return A if self.factor == "A" else B


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
class CorDA(Computed):
    """The part of W that the inputs' second moment C picks (Yang et al., 2024, arXiv:2406.05223).

    U S V^T of W C gives scale B A = U_r S_r V_r^T C^-1: `part="largest"` previews the task of the inputs, `"smallest"`
    leaves what the inputs show as it is. C gets 1 % of its mean diagonal added, and more until it can be inverted.
    """

    part: Literal["largest", "smallest"] = "largest"
    needs = frozenset({"inputs"})

    def factors(self, rank: int, scale: float, given: Given) -> tuple[Tensor, Tensor]:
        C, inverse = _invertible(given.about("inputs").to("cpu", torch.float32))
        U, S, Vt = torch.linalg.svd(given.weight @ C, full_matrices=False)
        keep = slice(None, rank) if self.part == "largest" else slice(-rank, None)
        return halves(U[:, keep], S[keep] / scale, Vt[keep] @ inverse)


def _invertible(C: Tensor) -> tuple[Tensor, Tensor]:
    eye, damp = torch.eye(len(C)), 0.01
    while True:
        damped = C + eye * C.diagonal().mean() * damp
        inverse, fails = torch.linalg.inv_ex(damped)
        if not fails and torch.dist(damped @ inverse, eye) < 0.05:
            return damped, inverse
        if damp > 1e6 or not C.isfinite().all():
            raise DeltaTuneError("CorDA cannot invert the inputs' second moment: it is zero, or holds NaN or infinity.")
        damp *= 2


@dataclass(frozen=True)
class LoRAGA(Computed):
    """Factors along the loss's gradient G = U S V^T (Wang et al., 2024, arXiv:2407.05000).

    `"ArB2r"`: A takes the right vectors 1..r and B the left ones r+1..2r times S; `"A2rBr"` the other way round; `"ArBr"`
    alternates. B is multiplied by d_out^(1/4) / sqrt(gamma), the paper's stable scale.
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr"] = "ArB2r"
    gamma: float = 16.0
    needs = frozenset({"gradient"})

    def leaves(self, site: Site, rank: int, scale: float) -> dict[str, Leaf]:
        if 2 * rank > min(site.d_in, site.d_out):
            wanted = f"write a rank of at most {min(site.d_in, site.d_out) // 2}"
            raise DeltaTuneError(
                f"LoRAGA needs 2 x rank = {2 * rank} singular vectors, but {site.path!r} is {site.d_out} x {site.d_in}; {wanted}."
            )
        return super().leaves(site, rank, scale)

    def factors(self, rank: int, scale: float, given: Given) -> tuple[Tensor, Tensor]:
        U, S, Vt = largest(given.oriented(given.about("gradient")), 2 * rank)
        lower, upper, even, odd = slice(rank), slice(rank, None), slice(None, None, 2), slice(1, None, 2)
        of_A, of_B = {"ArB2r": (lower, upper), "A2rBr": (upper, lower), "ArBr": (odd, even)}[self.direction]
        return Vt[of_A], U[:, of_B] * S[of_B] * (len(U) ** 0.25 / self.gamma**0.5)


@dataclass(frozen=True)
class EVA(Computed):
    """A = the directions in which the inputs vary most, B = 0 (Paischer et al., 2024, arXiv:2410.07170).

    A holds the leading eigenvectors of the uncentred second moment of the inputs; every site has the same rank.
    """

    needs = frozenset({"inputs"})

    def leaves(self, site: Site, rank: int, scale: float) -> dict[str, Leaf]:
        return Neutral(StartFactor(self, "A", scale)).leaves(site, rank, scale)

    def factors(self, rank: int, scale: float, given: Given) -> tuple[Tensor, Tensor]:
        _, vectors = torch.linalg.eigh(given.about("inputs").to("cpu", torch.float32))
        return vectors.mT.flip(0)[:rank], torch.zeros(given.site.d_out, rank)

    def unfold(self, p: Any) -> Any:
        return p


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
