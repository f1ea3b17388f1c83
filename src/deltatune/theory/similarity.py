"""Linear CKA: how alike two models represent the same text, layer by layer (Kornblith et al., 2019, arXiv:1905.00414).

    CKA(X, Y) = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)        X [n, d_a], Y [n, d_b]: states of n tokens, columns centred

1 for representations that differ by a rotation and a scale, 0 for uncorrelated ones. It is summed up over batches exactly,
from the moments [d_a, d_b] of all tokens, so it does not depend on how they are batched. With fewer tokens than d it is
high for any two models: take several times as many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.theory.finding import Finding
from deltatune.theory.sides import Batch, Side, check_some, evaluating, real, running
from deltatune.theory.watch import watching


@dataclass(frozen=True)
class Similarity(Finding):
    """Linear CKA between two models by site, over `tokens` tokens (the fewest of any site), `width` the widest state."""

    cka: Mapping[str, float]
    tokens: int
    width: int

    @property
    def finding(self) -> str:
        low = min(self.cka, key=lambda name: self.cka[name])
        few = f"; {self.tokens} tokens are few for states of width {self.width}" if self.tokens < 2 * self.width else ""
        return f"The representations differ most at {low}, where CKA is {self.cka[low]:.3f} (over {self.tokens} tokens{few})."


class Moments:
    """Sums over tokens of x [d_a], y [d_b] and their products, in float64: all that linear CKA needs of them."""

    def __init__(self) -> None:
        self.n = 0
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Add tokens' states X [n, d_a] and Y [n, d_b]."""
        X, Y = X.double(), Y.double()
        first, second = [X.sum(0), Y.sum(0)], [X.mT @ X, Y.mT @ Y, X.mT @ Y]
        old = self.n > 0
        self.first = [a + b for a, b in zip(self.first, first, strict=True)] if old else first
        self.second = [a + b for a, b in zip(self.second, second, strict=True)] if old else second
        self.n += X.shape[0]

    def cka(self) -> float:
        """Return linear CKA of all that was added; 0 where one of the two does not vary."""
        (x, y), (xx, yy, xy) = self.first, self.second
        pairs = (xx, x, x), (yy, y, y), (xy, x, y)
        own, other, both = (float((m - torch.outer(a, b) / self.n).norm()) for m, a, b in pairs)
        return both**2 / (own * other) if own * other else 0.0


@torch.no_grad()
def compare_states(model: nn.Module, a: Side, b: Side, batches: Iterable[Batch], where: str = "block") -> Similarity:
    """Return linear CKA between two sides at every site of `where`: weights for `model`, None for it as it is, or models.

    Padding does not count. Keeps three moments a site. Raises `DeltaTuneError` as `watching` does.
    """
    moments: dict[str, Moments] = {}
    for batch in batches:
        first, second = (states(model, side, batch, where) for side in (a, b))
        for address, (_, X, Y) in pairs(first, second).items():
            moments.setdefault(address, Moments()).add(X, Y)
    check_some(moments)
    tokens, width = min(m.n for m in moments.values()), max(m.first[0].numel() for m in moments.values())
    return Similarity({address: m.cka() for address, m in moments.items()}, tokens, width)


States = dict[str, tuple[Site, Tensor, Tensor]]


def states(model: nn.Module, side: Side, batch: Batch, where: str) -> States:
    """Return the states [rows, length, d] at each site of a side, by address, and which of their positions are no padding."""
    with running(model, side) as live, evaluating(live), watching(live, where) as seen:
        live(**batch)
        return {n: (s, h, real(live, batch, h.shape[:-1], s.stack or None).to(h.device)) for n, (s, h) in seen.items()}


def pairs(first: States, second: States) -> dict[str, tuple[Site, Tensor, Tensor]]:
    """Return the states [n, d_a] and [n, d_b] of the same tokens at the sites of both sides, without padding.

    Raises `DeltaTuneError` when the sides have other sites or other tokens.
    """
    if first.keys() != second.keys():
        apart = ", ".join(sorted(first.keys() ^ second.keys())[:3])
        raise DeltaTuneError(f"only one of the two models has {apart}; name a where that both have, as block[:4].")
    found = {}
    for address, (site, X, mask) in first.items():
        Y = second[address][1]
        if X.shape[:-1] != Y.shape[:-1]:
            raise DeltaTuneError(
                f"the states at {address} have the shapes {tuple(X.shape)} and {tuple(Y.shape)}: they are not of the same "
                "tokens (a soft prompt lengthens them); ask at the other stack, or of `theory.function_gap.compare_answers`."
            )
        found[address] = site, X[mask], Y[mask]
    return found
