"""Mixture: a router weighs several methods for every token (X-LoRA: Buehler and Buehler, 2024, arXiv:2402.07148).

    y' = y + sum_i a_i (m_i(y) - y)        a = softmax(x R^T / temperature)        R: [n, d]

With `top=k` only the k largest shares count, rescaled to sum to 1 (Shazeer et al., 2017). R starts N(0, 0.02^2). Parameters:
n d a site, and those of the methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.core.delta import place
from deltatune.core.leaf import Leaf, Normal
from deltatune.core.method import Bag, Method
from deltatune.core.site import Site
from deltatune.core.weights import Weights, init
from deltatune.errors import DeltaTuneError
from deltatune.methods._combined import Combined
from deltatune.methods._mixed import no_heads, some


@dataclass(frozen=True)
class Mixture(Combined):
    """Routed experts: y' = y + sum_i softmax(x R^T / temperature)_i (m_i(y) - y) (Buehler and Buehler, 2024)."""

    methods: tuple[Method, ...]
    top: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        some(self)
        no_heads(self, "the router looks at outputs and hidden states")
        if not 0 <= self.top <= len(self.methods):
            raise DeltaTuneError(f"Mixture(top={self.top}) of {len(self.methods)} methods; write 0 for all of them.")

    @property
    def children(self) -> tuple[Method, ...]:
        return self.methods

    @property
    def breaks(self) -> Any:  # type: ignore[override]
        """The laws of the children, and merging: the shares depend on the input."""
        return {**super().breaks, "merge": "which method counts depends on the input, which no weight can express"}

    def own(self, site: Site) -> dict[str, Leaf]:
        width = site.width if self.acts == "stream" else site.d_in
        return {"R": Leaf((len(self.methods), width), Normal(0.02))}

    def scores(self, p: Any, x: Tensor) -> Tensor:
        """Return how well each method fits each token, [..., n]."""
        return F.linear(x, p.R)

    def mix(self, p: Any, x: Tensor, before: Tensor, after: list[Tensor]) -> Tensor:
        scores = self.scores(p, x) / self.temperature
        least = scores.topk(self.top or scores.shape[-1], -1).values[..., -1:]
        shares = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
        changes = torch.stack(after, -1) - before[..., None]
        return before + torch.einsum("...dn,...n->...d", changes, shares)


@dataclass(frozen=True)
class Arrow(Mixture):
    """Mixture of trained methods without a trained router: scores |x R^T|, R from `arrow` (Ostapenko et al., 2024)."""

    def own(self, site: Site) -> dict[str, Leaf]:
        return {name: replace(leaf, trained=False, stored=True) for name, leaf in super().own(site).items()}

    def scores(self, p: Any, x: Tensor) -> Tensor:
        return super().scores(p, x).abs()


@torch.no_grad()
def arrow(model: nn.Module, experts: Sequence[Weights], top: int = 3, temperature: float = 1.0) -> Weights:
    """Return the mixture of weights trained apart; row i of R is the direction that expert i's change answers most to.

    That is the first right singular vector of W'_i - W (Ostapenko et al., 2024, arXiv:2405.11157). Raises `DeltaTuneError`
    unless every expert is one method on linear layers at one and the same where.
    """
    terms = [w.delta.terms for w in experts]
    if (
        not experts
        or any(len(t) != 1 or t[0].method.acts != "linear" for t in terms)
        or len({t[0].where for t in terms}) > 1
    ):
        raise DeltaTuneError(
            f"arrow mixes weights of one method on linear layers at one where; found {', '.join(str(w.delta) for w in experts)}."
        )
    delta = Arrow(tuple(t[0].method for t in terms), min(top, len(experts)), temperature).at(terms[0][0].where)
    started = init(delta, model)
    tensors, fixed = dict(started.tensors), dict(started.fixed)
    for placement in place(model, delta):
        rows = []
        for i, expert in enumerate(experts):
            own = {n: expert.held[f"0.{placement.site.address}.{n}"] for n in terms[i][0].method.leaves(placement.site)}
            tensors |= {placement.name(f"{i}/{n}"): tensor for n, tensor in own.items()}
            rows.append(_direction(terms[i][0].method, own, placement.site))
        fixed[placement.name("R")] = torch.stack(rows)
    return Weights(delta, tensors, started.backbone, started.seed, fixed=fixed)


def _direction(method: Any, leaves: dict[str, Tensor], site: Site) -> Tensor:
    change = method.computes.weight(method.unfold(Bag(leaves)), torch.zeros(site.d_out, site.d_in))
    return torch.linalg.svd(change, full_matrices=False).Vh[0]
