"""PerExpert: a method on linear layers, for every expert of a layer whose weights are one 3-D parameter (no paper; mixtures of
experts: Shazeer et al., 2017, arXiv:1701.06538).

    W'[e] = m_e(W[e])        W: [experts, d_out, d_in], or [experts, d_in, d_out] with transposed=True

A leaf of m becomes one tensor with an expert dimension in front, in which every expert starts by itself; what m shares over
all its sites, all experts share too. `only` names the parameter, where a place holds others as well: transformers stores
`gate_up_proj` and `down_proj`, and gpt-oss theirs transposed, beside biases. Parameters: experts times those of m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape
from deltatune.core.method import Bag, Method, OnTensor
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError

SHARED = "shared/"  # in front of the names of leaves that have no expert dimension


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
        return Given(_expert(site, self.transposed), {"weight": own, site.tensor or "": own}, measured)


@dataclass(frozen=True)
class PerExpert(OnTensor):
    """Every expert by itself: W'[e] = inner_e(W[e]) for the 3-D weights of a mixture of experts."""

    inner: Method
    only: str = ""
    transposed: bool = False

    where = "path:**.experts"
    kinds = ("container",)

    def __post_init__(self) -> None:
        if self.inner.acts != "linear":
            raise DeltaTuneError(
                f"PerExpert makes new weights; {self.inner} is no method on linear layers, as LoRA() is."
            )
        if "merge" in self.inner.breaks:
            raise DeltaTuneError(
                f"PerExpert makes new weights, and {self.inner} has none: {self.inner.breaks['merge']}."
            )

    @property
    def breaks(self) -> Any:  # type: ignore[override]
        """The laws that the inner method breaks."""
        return self.inner.breaks

    def takes(self, site: Site) -> bool:
        return self.only in ("", site.tensor)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        name = f"{site.path}.{site.tensor}"
        if len(site.shape) != 3:
            raise DeltaTuneError(
                f"PerExpert acts on parameters [experts, d_out, d_in]; {name!r} is {list(site.shape)}. Write "
                'only="..." with the name of a 3-D parameter, or put the inner method at the linear layers themselves.'
            )
        leaves = self.inner.leaves(_expert(site, self.transposed))
        for leaf in leaves.values():
            if "inputs" in leaf.init.needs:
                raise DeltaTuneError(
                    f"{self.inner} starts from a layer's inputs, which are not known for one expert of {name!r}."
                )
        hollow = Bag({leaf: torch.empty(d.shape, device="meta") for leaf, d in leaves.items()})
        if self.inner.computes.bias(self.inner.unfold(hollow), None) is not None:  # type: ignore[attr-defined]
            raise DeltaTuneError(
                f"{self.inner} changes a bias, and {name!r} has none; give PerExpert a method on weights alone."
            )
        mine: dict[str, Leaf] = {}
        for leaf, d in leaves.items():
            shared = d.scope == "delta"
            shape = d.shape if shared else (site.shape[0], *d.shape)
            init = OfExperts(d.init, shared, self.transposed)
            mine[SHARED + leaf if shared else leaf] = replace(d, shape=shape, init=init)
        return mine

    def value(self, p: Any, theta: Tensor) -> Tensor:
        def one(leaves: dict[str, Tensor], stored: Tensor) -> Tensor:
            W = stored.mT if self.transposed else stored
            new = self.inner.computes.weight(self.inner.unfold(Bag(leaves)), W)  # type: ignore[attr-defined]
            return new.mT if self.transposed else new

        leaves = {name.removeprefix(SHARED): tensor for name, tensor in vars(p).items()}
        axes = {name.removeprefix(SHARED): None if name.startswith(SHARED) else 0 for name in vars(p)}
        return torch.func.vmap(one, in_dims=(axes, 0))(leaves, theta)

    def penalty(self, p: Any) -> Tensor | None:
        terms = [self.inner.computes.penalty(self.inner.unfold(one)) for one in _experts(p)]
        some = [term for term in terms if term is not None]
        return torch.stack(some).sum() if some else None

    def draw(self, p: Any, generator: Generator) -> dict[str, Tensor]:
        return _gathered(p, [self.inner.draw(one, generator) for one in _experts(p)])

    def step(self, sites: list[Any], step: int, steps: int) -> list[dict[str, Tensor]] | None:
        experts = [_with_gradients(p, _experts(p)) for p in sites]
        moved = self.inner.step([one for own in experts for one in own], step, steps)
        if moved is None:
            return None
        rest = iter(moved)
        return [_gathered(p, [next(rest) for _ in own]) for p, own in zip(sites, experts, strict=True)]


def _expert(site: Site, transposed: bool) -> Site:
    """Return the site of one expert, a linear layer without a bias."""
    _, first, last = site.shape
    sizes = {"d_out": last, "d_in": first} if transposed else {"d_out": first, "d_in": last}
    return replace(site, kind="linear", transposed=transposed, bias=False, shape=(first, last), **sizes)


def _experts(p: Any) -> list[Any]:
    """Return the inner method's tensors of every expert."""
    count = next((len(tensor) for name, tensor in vars(p).items() if not name.startswith(SHARED)), 1)
    return [
        Bag({name.removeprefix(SHARED): t if name.startswith(SHARED) else t[e] for name, t in vars(p).items()})
        for e in range(count)
    ]


def _with_gradients(p: Any, experts: list[Any]) -> list[Any]:
    """Return the tensors of every expert with their part of the gradients."""
    for name, tensor in vars(p).items():
        if tensor.grad is not None and not name.startswith(SHARED):
            for one, grad in zip(experts, tensor.grad, strict=True):
                vars(one)[name].grad = grad
    return experts


def _gathered(p: Any, experts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return one tensor for each leaf that every expert has a new value for."""
    first = experts[0]
    shared = {SHARED + name: new for name, new in first.items() if SHARED + name in vars(p)}
    own = [name for name in first if SHARED + name not in vars(p)]
    return shared | {name: torch.stack([one[name] for one in experts]) for name in own}
