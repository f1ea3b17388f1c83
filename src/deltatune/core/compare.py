"""How far apart two deltas are, module by module.

    distance = |Delta_a - Delta_b|        Delta = W' - W, Frobenius norms

LoRAs of any ranks are compared by their products, which needs no backbone. On a backbone any two mergeable deltas are
compared by what they do to its weights. Without one, other deltas of one spec are compared leaf by leaf: then the distance
is one of numbers, and two deltas that are apart may compute the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from deltatune.core.arithmetic import factors, is_lora
from deltatune.core.contents import by_site, natural
from deltatune.core.convert import changes
from deltatune.core.fit import check_backbone
from deltatune.core.site import Site, describe
from deltatune.core.subspace import Dense, Product, angles, spans
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class Distance:
    """How two changes of one module compare: distance, norms, ranks of matrices, and principal angles in radians, ascending.

    `outputs` are the angles between the spans of the columns, in which outputs move, and `inputs` those of the rows.
    """

    distance: float
    norms: tuple[float, float]
    ranks: tuple[int, int] | None = None
    outputs: tuple[float, ...] = ()
    inputs: tuple[float, ...] = ()

    @property
    def relative(self) -> float:
        """The distance over the larger norm: 0 for equal changes, 1 when one is nothing, 2 for opposite ones."""
        return self.distance / max(self.norms) if max(self.norms) else 0.0

    @property
    def cosine(self) -> float | None:
        """The cosine between the two changes as vectors, or None when one is nothing."""
        a, b = self.norms
        return max(-1.0, min(1.0, (a * a + b * b - self.distance**2) / (2 * a * b))) if a and b else None


@dataclass(frozen=True)
class Comparison:
    """The distances of two deltas by module, and what they were measured on: the changes of weights, or the leaves."""

    by: Literal["changes", "leaves"]
    modules: Mapping[str, Distance]

    @property
    def total(self) -> Distance:
        """The distance of the two as a whole."""
        each = self.modules.values()
        a, b = (math.hypot(*(d.norms[i] for d in each)) for i in (0, 1))
        return Distance(math.hypot(*(d.distance for d in each)), (a, b))


@torch.no_grad()
def compare(a: Weights, b: Weights, model: nn.Module | None = None, check: bool = True) -> Comparison:
    """Return how far two deltas for one backbone are apart, by module.

    Raises `DeltaTuneError` when they are for different backbones, and when they are unlike and there is no `model`.
    """
    check_backbone(a.backbone, b.backbone, check)
    if all(is_lora(t.method) and t.method.computes is t.method for w in (a, b) for t in w.delta.terms):
        return _compared("changes", _products(a), _products(b))
    merges = all("merge" not in term.method.breaks for w in (a, b) for term in w.delta.terms)
    if model is not None and (merges or a.delta != b.delta):
        return _compared("changes", _on(model, a, check), _on(model, b, check))
    if a.delta == b.delta:
        return _compared("leaves", _leaves(a), _leaves(b))
    raise DeltaTuneError(
        f"{a.delta} and {b.delta} are unlike, so only what they do to a backbone's weights can be compared: name the backbone."
    )


def _products(weights: Weights) -> dict[str, Any]:
    """Return the change of every LoRA as a product, those of several terms at one site added up."""
    found: dict[str, Product] = {}
    for (term, address), leaves in by_site(weights).items():
        method = weights.delta.terms[term].method
        try:
            A, B = factors(method, leaves)
        except AttributeError:  # a file may hold what it likes
            raise DeltaTuneError(f"the weights hold {', '.join(leaves)} of {method} at {address!r}.") from None
        found[address] = found[address].plus(Product(B, A)) if address in found else Product(B, A)
    return found


def _on(model: nn.Module, weights: Weights, check: bool) -> dict[str, Any]:
    """Return the change of every parameter, matrices as [d_out, d_in]."""
    found = {}
    for name, change in changes(model, weights, check).items():
        path, _, leaf = name.rpartition(".")
        site = describe(Site("path", path), model.get_submodule(path), 0)
        linear = leaf == "weight" and site.kind in ("linear", "embedding", "conv")
        found[name] = Dense(site.matrix(change) if linear else change)
    return found


def _leaves(weights: Weights) -> dict[str, Any]:
    return {name: Dense(t.double().flatten()) for name, t in weights.held.items() if t.is_floating_point()}


def _compared(by: Literal["changes", "leaves"], a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    return Comparison(by, {name: _distance(a.get(name), b.get(name)) for name in sorted({*a, *b}, key=natural)})


def _distance(a: Any, b: Any) -> Distance:
    if a is None or b is None:
        norms = (0.0 if a is None else a.norm, 0.0 if b is None else b.norm)
        return Distance(max(norms), norms)
    distance, norms = a.minus(b).norm, (a.norm, b.norm)
    both = a.svd(), b.svd()
    if None in both:
        return Distance(distance, norms)
    (out_a, in_a), (out_b, in_b) = (spans(svd) for svd in both)
    ranks = out_a.shape[1], out_b.shape[1]
    return Distance(distance, norms, ranks, angles(out_a, out_b), angles(in_a, in_b))
