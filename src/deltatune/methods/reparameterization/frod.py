"""FRoD: a weight turned in a basis that all sites share, by a diagonal and a few other entries (AAAI 2026, doi:10.1609/aaai.v40i31.39813).

    W' = W R (diag(l) + S) V^T = W + W R (diag(l - 1) + S) V^T        V, R = V^-T: [d_in, d_in]   l: [d_in]

S has `share` d_in^2 entries off the diagonal, at places that come back from the seed. l starts at 1 and S at zero, so the
delta starts neutral. This is the paper's U (diag(L) + S) V^T with U = W R diag(1/L_0) and its L and the rows of S in units
of L_0, the column norms of W R. The paper decomposes the weights of all layers jointly to find V, which is not orthogonal;
here V holds the right singular vectors of the first site's weight of each width, so that R = V, and one term for each role is
best. An `oblique` delta has an R of its own, for a V from elsewhere. V and R are not trained and travel with the weights.
Parameters: d_in + share d_in^2 a site.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Given, Init, Leaf, Ones, Shape
from deltatune.core.method import Bag, Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._entries import scatter
from deltatune.methods._shared import find, shared


@dataclass(frozen=True)
class RightVectors(Init):
    """All right singular vectors of the site's weight, as columns."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.linalg.svd(given.weight, full_matrices=True).Vh.mT.contiguous()


@dataclass(frozen=True)
class OffDiagonal(Init):
    """Distinct random places off the diagonal of a matrix [width, width], row major, int64."""

    width: int

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        picked = torch.randperm(self.width * (self.width - 1), generator=generator)[: shape[0]]
        row, column = picked // (self.width - 1), picked % (self.width - 1)
        return row * self.width + column + (column >= row)


@dataclass(frozen=True)
class FRoD(OnLinear):
    """Full-rank adaptation in a shared basis: W' = W V^-T (diag(l) + S) V^T (AAAI 2026)."""

    share: float = 0.01
    oblique: bool = False

    where = "{attn.{q,v},cross.{q,v}?}"
    kinds = ("linear", "conv")  # a basis [d_in, d_in] of a vocabulary fits no memory

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise DeltaTuneError(
                f"FRoD(share={self.share}) is not a share; write a number between 0 and 1, such as 0.01."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        d = site.d_in
        count = max(1, min(int(d * d * self.share), d * (d - 1)))
        bases = [shared(name, (d, d), RightVectors()) for name in ("V", "R")[: 1 + self.oblique]]
        stored = {name: replace(leaf, stored=True) for basis in bases for name, leaf in basis.items()}
        places = shared("j", (count,), OffDiagonal(d))
        return {**stored, **places, "l": Leaf((d,), Ones()), "S": Leaf((count,))}

    def unfold(self, p: Any) -> Any:
        V, d = find(p, "V"), len(p.l)
        turn = torch.diag(p.l - 1) + scatter(p.S, find(p, "j"), d, d)
        return Bag({"V": V, "R": find(p, "R", V), "turn": turn})

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + (W.to(p.V.dtype) @ p.R @ p.turn @ p.V.mT).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + F.linear(x.to(y.dtype) @ p.V @ p.turn.mT @ p.R.mT, base.weight.to(y.dtype))
