"""Diff pruning: a sparse change of every parameter, its sparsity learned (Guo et al., 2021, arXiv:2012.07463).

    DiffPruning: theta' = theta + z * w                           w, alpha, noise: the shape of theta
    StructuredDiffPruning: theta' = theta + z_t z * w             z_t: [1], a gate like z for each parameter tensor
    z = clamp(s (high - low) + low, 0, 1),   s = sigmoid(alpha + noise),   noise = log u - log(1 - u)
    penalty = cost sum_i sigmoid(alpha_i - log(-low / high))      the expected number of entries that change

u ~ U(1e-4, 1 - 1e-4) is drawn anew at every training step; outside training u = 1/2, so the gate is deterministic.
w starts at zero, so the delta starts neutral; alpha starts at 5 (gates open). Parameters: 2 |theta|. Phase 2: `prune`
keeps the largest share of all changes, and `FixedMask` trains these on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from deltatune.core.delta import Delta, Term, place
from deltatune.core.leaf import Constant, Leaf
from deltatune.core.method import Bag, Method, OnTensor
from deltatune.core.site import Site
from deltatune.core.spec import build
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.methods._sparse import Counts, by_module, check_share, top_of_all


@dataclass(frozen=True)
class DiffPruning(OnTensor):
    """Phase 1 of diff pruning: theta' = theta + z * w with hard-concrete gates z (Guo et al., 2021).

    `gate_rate` is the learning rate of the gates as a multiple of that of w: 0.1 to 1e-5 in the paper's code.
    """

    alpha: float = 5.0
    low: float = -1.5
    high: float = 1.5
    cost: float = 1.25e-7
    gate_rate: float = 1e4

    where = "block"

    def __post_init__(self) -> None:
        if not self.low < 0 < 1 < self.high:
            raise DeltaTuneError(
                f"{type(self).__name__}(low={self.low}, high={self.high}) has gates that never close or never open; "
                f"write low < 0 and high > 1, e.g. low=-1.5, high=1.5."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        gate = Leaf(site.shape, Constant(self.alpha), rate=self.gate_rate)
        return {"w": Leaf(site.shape), "alpha": gate, "noise": Leaf(site.shape, trained=False)}

    def mask(self, p: Any) -> Tensor:
        """Return the gates z, of the shape of theta."""
        return self._gate(p.alpha, p.noise)

    def value(self, p: Any, theta: Tensor) -> Tensor:
        return theta + (self.mask(p) * p.w).to(theta.dtype)

    def penalty(self, p: Any) -> Tensor:
        return self.cost * self._open(p.alpha).sum()

    def draw(self, p: Any, generator: Generator) -> dict[str, Tensor]:
        return {"noise": _logistic(p.noise, generator)}

    def _gate(self, alpha: Tensor, noise: Tensor) -> Tensor:
        return (torch.sigmoid(alpha + noise) * (self.high - self.low) + self.low).clamp(0, 1)

    def _open(self, alpha: Tensor) -> Tensor:
        return torch.sigmoid(alpha - math.log(-self.low / self.high))


@dataclass(frozen=True)
class StructuredDiffPruning(DiffPruning):
    """Diff pruning with a second gate for every parameter tensor: theta' = theta + z_tensor z * w (Guo et al., 2021).

    Parameters: 2 |theta| + 1 a parameter tensor.
    """

    def leaves(self, site: Site) -> dict[str, Leaf]:
        own = Leaf((1,), Constant(self.alpha), rate=self.gate_rate)
        return {**super().leaves(site), "alpha_tensor": own, "noise_tensor": Leaf((1,), trained=False)}

    def mask(self, p: Any) -> Tensor:
        return super().mask(p) * self._gate(p.alpha_tensor, p.noise_tensor)

    def penalty(self, p: Any) -> Tensor:
        return super().penalty(p) * self._open(p.alpha_tensor).sum()

    def draw(self, p: Any, generator: Generator) -> dict[str, Tensor]:
        return {**super().draw(p, generator), "noise_tensor": _logistic(p.noise_tensor, generator)}


def _logistic(like: Tensor, generator: Generator) -> Tensor:
    u = torch.rand(like.shape, generator=generator, device=generator.device).clamp(1e-4, 1 - 1e-4)
    return torch.logit(u).to(like)


@torch.no_grad()
def prune(model: nn.Module, weights: Weights, share: float = 0.005) -> Weights:
    """Return the largest `share` of all changes z * w as weights of `FixedMask`: phase 2 of diff pruning starts from them."""
    check_share("prune", share)
    sites, changes = [], []
    for placement in place(model, weights.delta):
        method = placement.method
        if not isinstance(method, DiffPruning):
            raise DeltaTuneError(f"prune needs the weights of DiffPruning alone; these hold {method} as well.")
        held = {
            n: weights.tensors.get(placement.name(n), torch.zeros(leaf.shape)) for n, leaf in placement.leaves.items()
        }
        p = Bag(held)
        sites.append(placement.site)
        changes.append(method.mask(p) * held["w"])
    picked = top_of_all([change.abs() for change in changes], share)
    terms = tuple(Term(where, _fixed(share, counts)) for where, counts in by_module(sites, picked).items())
    tensors, fixed = {}, {}
    kept = {
        site.address: (change.flatten(), places) for site, change, places in zip(sites, changes, picked, strict=True)
    }
    for placement in place(model, Delta(terms)):
        change, places = kept[placement.site.address]
        tensors[placement.name("value")], fixed[placement.name("index")] = change[places], places
    return Weights(Delta(terms), tensors, weights.backbone, weights.seed, weights.notes, fixed)


def _fixed(share: float, counts: Counts) -> Method:
    return build("FixedMask", {"share": share, "counts": counts}, Method)
