"""Placement by control: the sites at which a unit of control does most for the task, under a budget of parameters.

    authority_i = |grad_{d_i} H|^2 / n_i        n_i the trained parameters of candidate i

By the maximum principle grad_d H = -grad_d J, so this is what a step of unit length on candidate i gains of J to first order,
squared and for each parameter, at fresh weights and on the mean of a few batches. Taking the most first fills the budget.
(Li and Hao, 2018, arXiv:1803.01299, for the Hamiltonian; compare the search of S3Delta, `search_structure`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.attach import attach
from deltatune.core.delta import Delta, Placement, as_delta, place
from deltatune.core.method import Method
from deltatune.errors import DeltaTuneError
from deltatune.theory.finding import Finding
from deltatune.tuning.structure import fill, size


@dataclass(frozen=True)
class Placed(Finding):
    """A delta within a budget, its trained parameters, and the authority of every candidate, by site and method."""

    delta: Delta
    parameters: int
    authority: dict[str, float]

    @property
    def finding(self) -> str:
        """One sentence: where control is worth most, and where least."""
        best, least = (
            max(self.authority, key=self.authority.__getitem__),
            min(self.authority, key=self.authority.__getitem__),
        )
        return f"A parameter of {best} has most authority over the loss, one of {least} least; {self.parameters:,} are placed."

    def to_json(self) -> dict[str, Any]:
        """Return text, parameters and authorities."""
        return {"delta": str(self.delta), "parameters": self.parameters, "authority": self.authority}


def place_by_control(
    model: nn.Module,
    candidates: Delta | Method,
    batches: Iterable[Mapping[str, Any]],
    budget: int,
    seed: int = 0,
    loss: Callable[[Any], Tensor] = lambda output: output.loss,
) -> Placed:
    """Return the sites of `candidates` with most authority within `budget` trained parameters; the model stays as it is.

    `batches` are for `model(**batch)`. Raises `DeltaTuneError` when not even the smallest candidate fits, when there are no
    batches, or when a candidate trains nothing of its own.
    """
    candidates = as_delta(candidates)
    with attach(model, candidates, seed=seed) as attachment:
        leaves = dict(attachment.named_parameters())
        slopes = _mean_slopes(model, list(leaves.values()), batches, loss)
        by_name = dict(zip(leaves, slopes, strict=True))
        placements = attachment.placements
        for placement in placements:
            if not size(placement) or any(leaf.scope == "delta" for leaf in placement.leaves.values() if leaf.trained):
                raise DeltaTuneError(
                    f"{placement.method} trains nothing of its own at {placement.site.address!r}, so its sites cannot be weighed "
                    "against one another; take a method with leaves at every site, such as LoRA()."
                )
        worth = [
            float(sum(by_name[p.name(leaf)].square().sum() for leaf, d in p.leaves.items() if d.trained)) / size(p)
            for p in placements
        ]
    delta, parameters = fill(candidates, placements, worth, budget)
    return Placed(delta, parameters, dict(zip(_names(candidates, placements), worth, strict=True)))


def place_by_worth(
    model: nn.Module, candidates: Delta | Method, worth: Mapping[str, float], budget: int
) -> tuple[Delta, int]:
    """Return the candidates of most `worth` that fit into a budget, and their trained parameters.

    `worth` names candidates as `Placed.authority` and `Structure.probabilities` do. Raises `DeltaTuneError` when it lacks
    one, or when none fits.
    """
    candidates = as_delta(candidates)
    placements = place(model, candidates)
    names = _names(candidates, placements)
    lacking = [name for name in names if name not in worth]
    if lacking:
        raise DeltaTuneError(f"there is no worth of {lacking[0]!r}; give one for each of the {len(names)} candidates.")
    return fill(candidates, placements, [worth[name] for name in names], budget)


def even_worth(model: nn.Module, candidates: Delta | Method) -> dict[str, float]:
    """Return the worth by which any budget is spread evenly over the candidates in their order (van der Corput, 1935)."""
    candidates = as_delta(candidates)
    names = _names(candidates, place(model, candidates))
    digits = max(len(names) - 1, 1).bit_length()
    return {name: -float(int(f"{index:0{digits}b}"[::-1], 2)) for index, name in enumerate(names)}


def random_worth(model: nn.Module, candidates: Delta | Method, seed: int = 0) -> dict[str, float]:
    """Return the worth by which a budget goes to candidates at random."""
    candidates = as_delta(candidates)
    names = _names(candidates, place(model, candidates))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return {name: float(place) for name, place in zip(names, order, strict=True)}


def _names(candidates: Delta, placements: Sequence[Placement]) -> list[str]:
    return [f"{candidates.terms[p.term].method} at {p.site.address}" for p in placements]


def _mean_slopes(
    model: Any, leaves: list[nn.Parameter], batches: Iterable[Mapping[str, Any]], loss: Callable[[Any], Tensor]
) -> list[Tensor]:
    total, count = [torch.zeros_like(leaf) for leaf in leaves], 0
    for batch in batches:
        with torch.enable_grad():
            found = torch.autograd.grad(loss(model(**batch)), leaves, allow_unused=True)
        count += 1
        for sum_, slope in zip(total, found, strict=True):
            sum_ += 0 if slope is None else slope
    if not count:
        raise DeltaTuneError("authority is measured on batches of the task; there are none.")
    return [sum_ / count for sum_ in total]
