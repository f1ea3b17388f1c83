"""Starts of LoRA that evidence gives: the loss's gradient (LoRAGA), or the second moment of a layer's inputs (EVA, CorDA).

Everywhere scale = alpha / rank, and U S V^T is the singular value decomposition of what is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from deltatune.core.leaf import Given, Leaf
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._low_rank import halves, largest
from deltatune.methods._starts import Computed, Neutral, StartFactor


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
