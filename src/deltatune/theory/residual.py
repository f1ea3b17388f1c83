"""The solution-space residual: how much of fine-tuning's change a family of deltas cannot express.

    theta+ = psi(delta') + eps        eps = theta+ - theta_0 - nearest change that the family reaches, |eps|_2

in the norm over all parameters, those that are tied counted once (Ding et al., 2022, section 4.1). It is a lower bound on
|eps| over the family; of LoRA it is the tail of the singular values, of BitFit the mass outside biases, of a mask the mass
outside it, of DID the mass outside a Fastfood subspace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import hypot
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.convert import changes
from deltatune.core.delta import sites
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.theory.finding import Finding
from deltatune.theory.reach import Changes, Family, delta_of, nearest_changes


@dataclass(frozen=True)
class Residual(Finding):
    """|eps| of one family, |theta+ - theta_0| as `total`, both by parameter, and how many parameters the family trains."""

    family: str
    norms: Mapping[str, float]
    totals: Mapping[str, float]
    parameters: int

    @property
    def norm(self) -> float:
        """|eps|_2."""
        return hypot(*self.norms.values())

    @property
    def total(self) -> float:
        """|theta+ - theta_0|_2."""
        return hypot(*self.totals.values())

    @property
    def share(self) -> float:
        """|eps| / |theta+ - theta_0|: 0 where the family reaches theta+, 1 where it reaches nothing of the way there."""
        return self.norm / self.total if self.total else 0.0

    @property
    def finding(self) -> str:
        return (
            f"{self.family} ({self.parameters:,} parameters) leaves |eps| = {self.norm:.3g} of a change of {self.total:.3g}: "
            f"{100 * self.share**2:.1f} % of its squared norm."
        )


def residuals(
    model: nn.Module,
    tuned: Weights,
    families: Iterable[Family],
    seed: int = 0,
    evidence: Mapping[str, Any] | None = None,
    check: bool = True,
) -> list[Residual]:
    """Return the residual of what `tuned` (Full, or any mergeable delta) does to the backbone under each family.

    A family is a delta, `LoRA(rank=8)`, `BitFit()`, `FixedMask(share=0.01)` or `DID(dim=1000)` at its wheres, with `seed` and
    `evidence` as in `init`; or weights of one, whose mask or subspace is then meant. Takes two float64 copies of the
    parameters that change. Raises `DeltaTuneError` as `nearest_changes` does.
    """
    wanted = once(model, changes(model, tuned, check))
    if not any(map(torch.any, wanted.values())):
        raise DeltaTuneError(f"{tuned.delta} changes no weight of the backbone as it stands; train it first.")
    found = []
    for family in families:
        totals = {name: float(change.norm()) for name, change in wanted.items()}
        norms = dict(totals)
        for near in nearest_changes(model, family, wanted, seed, evidence):
            norms |= {name: float((wanted[name] - change).norm()) for name, change in near.items()}
        delta = delta_of(family)
        found.append(Residual(str(delta), norms, totals, sites(model, delta).parameters))
    return found


def once(model: nn.Module, changed: Changes) -> dict[str, Tensor]:
    """Return the changes without those of parameters that are under another name already."""
    return {name: changed[name] for name in dict.fromkeys(owners(model, changed).values())}


def owners(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return, for each parameter's name, the first of the names under which it is found; a new bias is its own."""
    held = {path: id(parameter) for path, parameter in model.named_parameters(remove_duplicate=False)}
    first: dict[object, str] = {}
    return {name: first.setdefault(held.get(name, name), name) for name in names}


@torch.no_grad()
def best_mask(changed: Changes, share: float) -> Residual:
    """Return the residual of the best mask of all: the change outside its `share` of largest entries.

    No mask of that size leaves less, so it bounds diff pruning, FISH and their like from below.
    """
    if not 0 < share <= 1:
        raise DeltaTuneError(f"a mask of the share {share} is none; write one above 0 and up to 1, e.g. 0.005.")
    sizes = torch.cat([change.abs().flatten() for change in changed.values()])
    k = max(1, round(share * sizes.numel()))
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    kept[sizes.topk(k).indices] = True
    parts = sizes.masked_fill(kept, 0.0).split([change.numel() for change in changed.values()])
    norms = {name: float(part.norm()) for name, part in zip(changed, parts, strict=True)}
    totals = {name: float(change.norm()) for name, change in changed.items()}
    return Residual(f"the best mask of {100 * share:g} %", norms, totals, k)
