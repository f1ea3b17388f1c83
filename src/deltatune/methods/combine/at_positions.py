"""AtPositions: a method on hidden states at the first or the last tokens of a text only (ReFT: Wu et al., 2024, arXiv:2404.03592).

    h'_t = m(h)_t for t < first or t >= n - last, else h_t

t counts a row's tokens from the first one that is not padding, in cached generation too; n is the row's length. `first`
holds for every stack: a row shorter than that is changed whole, and so are the tokens generated behind it, up to that
count. `last` needs the end of the text, which on a causal stack nothing tells while it is trained: it is refused there.
Parameters: those of m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Method, OnPositions
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class AtPositions(OnPositions):
    """Chosen positions: `inner` acts on the first `first` and the last `last` tokens of each row (Wu et al., 2024)."""

    inner: Method
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        if self.inner.acts != "stream":
            raise DeltaTuneError(
                f"AtPositions chooses positions of a hidden state, which {self.inner} does not act on; "
                "write for example AtPositions(LoReFT(), first=4)."
            )
        if min(self.first, self.last) < 0 or self.first + self.last < 1:
            raise DeltaTuneError(
                f"AtPositions(first={self.first}, last={self.last}) chooses no position; write at least 1 for one of them."
            )

    @property
    def where(self) -> str:  # type: ignore[override]
        """The inner method's default place."""
        return self.inner.where

    @property
    def breaks(self) -> Any:  # type: ignore[override]
        """The laws that the inner method breaks."""
        return self.inner.breaks

    @property
    def from_end(self) -> bool:
        """Whether it needs to know where the text ends."""
        return self.last > 0

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return self.inner.leaves(site)

    def unfold(self, p: Any) -> Any:
        return self.inner.unfold(p)

    def penalty(self, p: Any) -> Tensor | None:
        return self.inner.penalty(p)

    def draw(self, p: Any, generator: Generator) -> dict[str, Tensor]:
        return self.inner.draw(p, generator)

    def step(self, sites: list[Any], step: int, steps: int) -> list[dict[str, Tensor]] | None:
        return self.inner.step(sites, step, steps)

    def stream(self, p: Any, h: Tensor, at: Tensor) -> Tensor:
        inner: Any = self.inner.computes
        lengths = at.amax(1, keepdim=True) + 1
        chosen = (at < self.first) | (at >= lengths - self.last)
        return torch.where((chosen & (at >= 0))[..., None], inner.stream(p, h), h)
