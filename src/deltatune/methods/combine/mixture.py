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
from deltatune.core.fit import check_backbone, check_tensors
from deltatune.core.leaf import Given, Leaf, Normal
from deltatune.core.method import Bag, Method
from deltatune.core.site import Site
from deltatune.core.stored import Values
from deltatune.core.weights import Weights, completed, fingerprint
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
def arrow(
    model: nn.Module, experts: Sequence[Weights], top: int = 3, temperature: float = 1.0, check: bool = True
) -> Weights:
    """Return the mixture of weights trained apart; row i of R is the direction that expert i's change answers most to.

    That is the first right singular vector of W'_i - W (Ostapenko et al., 2024, arXiv:2405.11157). What an expert stores or
    regenerates from its seed is stored here. Raises `DeltaTuneError` unless every expert is one method on linear layers at
    one and the same where, made for this backbone (`check=False` allows other values).
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
    methods = tuple(t[0].method for t in terms)
    delta = Arrow(methods, min(top, len(methods)), temperature).at(terms[0][0].where)
    backbone = fingerprint(model)
    for expert in experts:
        check_backbone(expert.backbone, backbone, check)
    leaves = [_by_site(model, expert) for expert in experts]
    tensors: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    for placement in place(model, delta):
        site = placement.site
        W = Given(site, Values(model.get_submodule(site.path))).weight.double()
        own = [by_site[site.address] for by_site in leaves]
        for name, tensor in ((f"{i}/{leaf}", t) for i, found in enumerate(own) for leaf, t in found.items()):
            (tensors if placement.leaves[name].trained else fixed)[placement.name(name)] = tensor
        rows = [_direction(method, found, W) for method, found in zip(methods, own, strict=True)]
        fixed[placement.name("R")] = torch.stack(rows).float()
    return Weights(delta, tensors, backbone, fixed=fixed)


def _by_site(model: nn.Module, expert: Weights) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of all leaves of an expert by the address of their site and their name."""
    placements = place(model, expert.delta)
    check_tensors(expert, placements)
    held = completed(model, expert, placements)
    return {p.site.address: {leaf: held[p.name(leaf)] for leaf in p.leaves} for p in placements}


def _direction(method: Any, leaves: dict[str, Tensor], W: Tensor) -> Tensor:
    """Return the first right singular vector of W' - W, with W [d_out, d_in] in float64."""
    p = Bag({name: t.double() if t.is_floating_point() else t for name, t in leaves.items()})
    change = method.computes.weight(method.unfold(p), W) - W
    return torch.linalg.svd(change, full_matrices=False).Vh[0]
