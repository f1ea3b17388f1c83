"""FRoD: a weight turned in a basis that all sites share, by a diagonal and a few other entries (AAAI 2026, doi:10.1609/aaai.v40i31.39813).

    W' = W R (diag(l) + S) V^T = W + W R (diag(l - 1) + S) V^T        V, R = V^-T: [d_in, d_in]   l: [d_in]

S has `share` d_in^2 entries off the diagonal, at places that come back from the seed. l starts at 1 and S at zero, so the
delta starts neutral. This is the paper's U (diag(L) + S) V^T with U = W R diag(1/L_0) and its L and the rows of S in units
of L_0, the column norms of W R. V is the joint basis of the weights of all sites of one width, so write one term for each
role; inside a combinator it is that of the first site. V and R are not trained and travel with the weights. Parameters: d_in +
share d_in^2 a site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Given, Init, Leaf, Ones, Shape
from deltatune.core.method import Base, OnLinear, Own
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._entries import scatter
from deltatune.methods._joint import joint
from deltatune.methods._shared import find, shared


@dataclass(frozen=True)
class Joint(Init):
    """A part of the joint basis of the weights at some sites, V or R = V^-T; of the site's own where there are none."""

    part: str
    sites: tuple[Site, ...] = ()
    own: Own | None = field(default=None, repr=False, compare=False)

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        V, R = given.once("joint basis", lambda: joint([at.weight for at in self._given()] or [given.weight]))
        return V if self.part == "V" else R

    def _given(self) -> list[Given]:
        return [] if self.own is None else [Given(site, self.own(site)) for site in self.sites]


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

    where = "{attn.{q,v},cross.{q,v}?}"
    kinds = ("linear", "conv")  # a basis [d_in, d_in] of a vocabulary fits no memory

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise DeltaTuneError(
                f"FRoD(share={self.share}) is not a share; write a number between 0 and 1, such as 0.01."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return self._declared(site.d_in, (), None)

    def leaves_at(self, sites: Sequence[Site], own: Own) -> list[dict[str, Leaf]]:
        alike = {d: tuple(site for site in sites if site.d_in == d) for d in {site.d_in for site in sites}}
        return [self._declared(site.d_in, alike[site.d_in], own) for site in sites]

    def _declared(self, d: int, sites: tuple[Site, ...], own: Own | None) -> dict[str, Leaf]:
        count = max(1, min(int(d * d * self.share), d * (d - 1)))
        bases = [shared(part, (d, d), Joint(part, sites, own)) for part in ("V", "R")]
        stored = {name: replace(leaf, stored=True) for basis in bases for name, leaf in basis.items()}
        places = Leaf((count,), OffDiagonal(d), scope="delta", trained=False)
        return {**stored, f"j_{d}": places, "l": Leaf((d,), Ones()), "S": Leaf((count,))}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        V, R = find(p, "V"), find(p, "R")
        return W + (W.to(V.dtype) @ R @ _turn(p) @ V.mT).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        V, R = find(p, "V"), find(p, "R")
        return y + F.linear(x.to(y.dtype) @ V @ _turn(p).mT @ R.mT, base.weight.to(y.dtype))


def _turn(p: Any) -> Tensor:
    """Return diag(l - 1) + S, [d_in, d_in]."""
    return torch.diag(p.l - 1) + scatter(p.S, find(p, "j"), len(p.l), len(p.l))
