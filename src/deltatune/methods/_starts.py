"""Starts of LoRA: how its factors A [rank, d_in] and B [d_out, rank] begin, and which of them are trained.

A start whose product is not zero keeps it as untrained A_0 and B_0, so that the delta is neutral and its files hold for
the backbone as it is:

    W' = W + scale (B A - B_0 A_0) = W + scale [B, -B_0] [A; A_0]

Everywhere scale = alpha / rank. `_starts_of_weights` and `_starts_of_evidence` hold the starts themselves.
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
