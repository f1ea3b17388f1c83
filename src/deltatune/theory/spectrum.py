"""Spectra of what training does to weights, site by site, and how many directions carry it.

    Delta W = U diag(s) V^T        s [min(d_out, d_in)] descending
    effective rank = exp(-sum_k p_k ln p_k), p_k = s_k / sum s        (Roy and Vetterli, 2007)
    stable rank = |Delta W|_F^2 / s_1^2                               (Rudelson and Vershynin, 2007)
    energy(r) = sum_(k <= r) s_k^2 / sum_k s_k^2                      share of |Delta W|_F^2 that the best rank r keeps

The last is Eckart and Young's (1936).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import exp, log
from statistics import fmean

import torch
from torch import Tensor, nn

from deltatune.core.attach import attach
from deltatune.core.convert import changes
from deltatune.core.site import Site, anatomy, describe
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.methods.specification.full import Full
from deltatune.theory.finding import Finding
from deltatune.theory.residual import owners
from deltatune.theory.sides import Batch, Loss, check_some, evaluating, own_loss

MATRICES = ("linear", "embedding", "conv")
ROUNDING = 1e-12  # singular values below this share of the largest are rounding of float64


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix [d_out, d_in] at one site, descending."""

    address: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    values: tuple[float, ...]

    @property
    def energy(self) -> float:
        """|Delta W|_F^2."""
        return sum(s * s for s in self.values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares; 0 of nothing (Roy and Vetterli, 2007)."""
        total = sum(self.values)
        shares = [s / total for s in self.values if s > ROUNDING * self.values[0]]
        return exp(-sum(p * log(p) for p in shares)) if shares else 0.0

    @property
    def stable_rank(self) -> float:
        """|Delta W|_F^2 / s_1^2; 0 of nothing."""
        return self.energy / self.values[0] ** 2 if self.energy else 0.0

    def rank(self, share: float) -> int:
        """Return the smallest r whose best rank-r part keeps a `share` of the energy; 0 of nothing."""
        kept = accumulate((s * s for s in self.values), initial=0.0)
        return next(r for r, energy in enumerate(kept) if energy >= share * self.energy * (1 - ROUNDING))


@dataclass(frozen=True)
class Spectra(Finding):
    """The spectra of all matrices that change; `rest` is the squared norm of all that is no matrix (biases, norms)."""

    sites: tuple[Spectrum, ...]
    rest: float = 0.0
    of: str = "the change of weights"

    def rows(self) -> list[tuple[str, str, int | None, float, float, float]]:
        """Return (address, role, layer, norm, effective rank, stable rank) of each site."""
        return [(s.address, s.role, s.layer, s.energy**0.5, s.effective_rank, s.stable_rank) for s in self.sites]

    def by_role(self) -> dict[str, float]:
        """Return the mean effective rank of the sites that change, by role."""
        found: dict[str, list[float]] = {}
        for site in self.sites:
            if site.energy:
                found.setdefault(site.role, []).append(site.effective_rank)
        return {role: fmean(ranks) for role, ranks in found.items()}

    @property
    def finding(self) -> str:
        roles = self.by_role()
        if not roles:
            return f"No matrix has any of {self.of}."
        low, high = min(roles, key=lambda r: roles[r]), max(roles, key=lambda r: roles[r])
        widest = max(min(site.shape) for site in self.sites)
        spread = f"from {roles[low]:.1f} at {low} to {roles[high]:.1f} at {high}"
        return f"The effective rank of {self.of} goes {spread}, of {widest} at most ({len(self.sites)} matrices)."


def sites_of(model: nn.Module, name: str) -> list[Site]:
    """Return the sites whose matrix the parameter `name` holds, one for each role that shares it; none for other parameters."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    places = [p for p in anatomy(model).places if p.path == path and p.exit is None]
    found = [Site(p.role, path, p.stack, p.layer, p.part) for p in places] or [Site("path", path)]
    sites = [describe(site, module, 0) for site in found]
    return [site for site in sites if leaf == "weight" and site.kind in MATRICES]


@torch.no_grad()
def spectra_of(model: nn.Module, changed: Mapping[str, Tensor], of: str = Spectra.of) -> Spectra:
    """Return the spectra of `{parameter path: change}`, each change of its parameter's shape."""
    sites, rest = [], 0.0
    for name, change in changed.items():
        found = sites_of(model, name)
        for site in found:
            W = site.matrix(change.double())
            values = tuple(torch.linalg.svdvals(W).tolist())
            sites.append(Spectrum(site.address, site.role, site.layer, (W.shape[0], W.shape[1]), values))
        rest += 0.0 if found else float(change.double().square().sum())
    return Spectra(tuple(sites), rest, of)


def spectra(model: nn.Module, weights: Weights, check: bool = True) -> Spectra:
    """Return the spectra of what `weights` do to the backbone's matrices, W' - W in float64, tied ones once.

    Raises `DeltaTuneError` for a delta that is no change of weights: `theory.function_gap` compares its outputs instead.
    """
    check_mergeable(weights)
    changed = changes(model, weights, check)
    names: dict[str, str] = {}
    for name, first in owners(model, changed).items():
        if first not in names or not _is_known(model, names[first]):  # of the names of one value, that which has a role
            names[first] = name
    return spectra_of(model, {name: changed[name] for name in names.values()})


def gradient_spectra(model: nn.Module, where: str, batches: Iterable[Batch], loss: Loss = own_loss) -> Spectra:
    """Return the spectra of the gradient dF/dW [d_out, d_in], summed over the batches, of the weights at `where`.

    Takes one gradient of those weights, whatever the number of batches. The sum is over the signs that training would
    follow: noise that differs from batch to batch averages out.
    """
    count = 0
    with evaluating(model), attach(model, Full().at(where)) as attached:
        for batch in batches:
            loss(model(**batch)).backward()
            count += 1
        check_some(count)
        values = dict(attached.named_parameters())
        found = {f"{p.site.path}.{p.site.tensor}": values[p.name("value")].grad for p in attached.placements}
    return spectra_of(model, {n: g for n, g in found.items() if g is not None}, f"the gradient of {count} batches")


def _is_known(model: nn.Module, name: str) -> bool:
    return any(place.path == name.rpartition(".")[0] for place in anatomy(model).places)


def check_mergeable(weights: Weights) -> None:
    """Raise `DeltaTuneError`, with what to ask instead, for a delta that is no change of weights."""
    for term in weights.delta.terms:
        if "merge" in term.method.breaks:
            raise DeltaTuneError(
                f"{term.method} has no change of a weight to look at: {term.method.breaks['merge']}. Ask for the gap "
                "(`deltatune theory gap`, `theory.function_gap.compare_answers`), which looks at outputs, or take a delta such as "
                "LoRA or Full."
            )
