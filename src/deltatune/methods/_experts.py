"""One tensor for all experts: a leaf with an expert dimension in front, its start, and each expert's part of it.

A leaf that all experts share has no such dimension; its name begins with `shared/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Shape
from deltatune.core.method import Bag
from deltatune.core.site import Site

SHARED = "shared/"


@dataclass(frozen=True)
class OfExperts(Init):
    """The start of a leaf: `inner` at one expert after the other, or at the first one for a leaf that all share."""

    inner: Init
    shared: bool
    transposed: bool

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The evidence that the inner start needs."""
        return self.inner.needs

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        if self.shared:
            return self.inner.fill(shape, generator, self._one(given, 0))
        return torch.stack([self.inner.fill(shape[1:], generator, self._one(given, e)) for e in range(shape[0])])

    def _one(self, given: Given, expert: int) -> Given:
        """Return what the start of one expert may look at."""
        site = given.site
        own, name = given.tensors[site.tensor or ""][expert], f"{site.path}.{site.tensor}"
        measured = {
            kind: {name: found[name][expert]} if isinstance(found, Mapping) and name in found else found
            for kind, found in given.evidence.items()
        }
        return Given(one_expert(site, self.transposed), {"weight": own, site.tensor or "": own}, measured)


def one_expert(site: Site, transposed: bool) -> Site:
    """Return the site of one expert, a linear layer without a bias."""
    _, first, last = site.shape
    sizes = {"d_out": last, "d_in": first} if transposed else {"d_out": first, "d_in": last}
    return replace(site, kind="linear", transposed=transposed, bias=False, shape=(first, last), **sizes)


def split(p: Any) -> list[Any]:
    """Return the inner method's tensors of every expert."""
    count = next((len(tensor) for name, tensor in vars(p).items() if not name.startswith(SHARED)), 1)
    return [
        Bag({name.removeprefix(SHARED): t if name.startswith(SHARED) else t[e] for name, t in vars(p).items()})
        for e in range(count)
    ]


def with_gradients(p: Any, experts: list[Any]) -> list[Any]:
    """Return the tensors of every expert with their part of the gradients."""
    for name, tensor in vars(p).items():
        if tensor.grad is not None and not name.startswith(SHARED):
            for one, grad in zip(experts, tensor.grad, strict=True):
                vars(one)[name].grad = grad
    return experts


def gathered(p: Any, experts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return one tensor for each leaf that every expert has a new value for."""
    first = experts[0]
    shared = {SHARED + name: new for name, new in first.items() if SHARED + name in vars(p)}
    own = [name for name in first if SHARED + name not in vars(p)]
    return shared | {name: torch.stack([one[name] for one in experts]) for name in own}
