"""Structure search: which sites a delta should have under a budget of parameters (S3Delta: Hu et al., 2022, arXiv:2206.07382).

    p_i = sigmoid((alpha_i - zeta) / beta)        zeta solves sum_i n_i p_i = budget
    z_i = sigmoid((logit u + logit p_i) / temperature)        u ~ U(0, 1)

n_i are the parameters of candidate i. The delta's leaves learn on train batches, alpha on dev batches, both through the same
sample z; the sites with the largest p that fit into the budget make an ordinary delta.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.attach import Attachment, attach
from deltatune.core.delta import Delta, Placement, Term, as_delta
from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.core.spec import build
from deltatune.errors import DeltaTuneError

Batches = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Structure:
    """What a search found: the delta, its trained parameters, and the probability of every candidate by site and method."""

    delta: Delta
    parameters: int
    probabilities: dict[str, float]


def search_structure(
    model: nn.Module,
    candidates: Delta | Method,
    train: Batches,
    dev: Batches,
    budget: int,
    steps: int = 200,
    lr: float = 1e-3,
    structure_lr: float = 0.1,
    beta: float = 1.0,
    temperature: float = 0.5,
    seed: int = 0,
    loss: Callable[[Any], Tensor] = lambda output: output.loss,
) -> Structure:
    """Return the sites of `candidates` that help most within `budget` trained parameters; the model stays as it is.

    `train` and `dev` are batches for `model(**batch)`, used in turn. Raises `DeltaTuneError` when not even the smallest
    candidate fits, or when there are no batches.
    """
    candidates = as_delta(candidates)
    if not train or not dev:
        raise DeltaTuneError("a structure is searched on train and on dev batches; one of them is empty.")
    weighed = Delta(tuple(Term(t.where, build("Choose", {"inner": t.method})) for t in candidates.terms))
    attachment = attach(model, weighed, seed=seed)
    try:
        search = _Search(attachment, budget, lr, structure_lr, beta, temperature, seed)
        turns = zip(itertools.cycle(train), itertools.cycle(dev), range(steps), strict=False)
        for batch, held_out, _ in turns:
            search.step(lambda given: loss(model(**given)), batch, held_out)
    finally:
        attachment.detach()
    return search.result(candidates)


class _Search:
    """The state of one search."""

    def __init__(
        self, attachment: Attachment, budget: int, lr: float, structure_lr: float, beta: float, heat: float, seed: int
    ) -> None:
        self.placements, self.budget, self.beta, self.heat = attachment.placements, budget, beta, heat
        named = dict(attachment.named_parameters())
        self.z = [named[p.name("z")] for p in self.placements]
        weights = {id(z) for z in self.z}
        self.sizes = torch.tensor([float(one) for one in sizes_within(self.placements, budget)])
        self.alpha = torch.zeros(len(self.placements), requires_grad=True)
        self.leaves = torch.optim.AdamW([t for t in named.values() if id(t) not in weights], lr=lr, weight_decay=0.0)
        self.structure = torch.optim.Adam([self.alpha], lr=structure_lr)
        self.generator = torch.Generator().manual_seed(seed)

    def probabilities(self) -> Tensor:
        """Return p, differentiable in alpha through zeta too."""
        zeta = solve(self.alpha.detach(), self.sizes, self.budget, self.beta)
        p = torch.sigmoid((self.alpha.detach() - zeta) / self.beta)
        slope = self.sizes * p * (1 - p)
        zeta = zeta + (slope / slope.sum().clamp(min=1e-12)) @ (self.alpha - self.alpha.detach())
        return torch.sigmoid((self.alpha - zeta) / self.beta)

    def step(self, loss: Callable[[Mapping[str, Any]], Tensor], train: Any, dev: Any) -> None:
        """Take one step of the leaves on train, then one of the structure on dev."""
        u = torch.rand(len(self.z), generator=self.generator).clamp(1e-6, 1 - 1e-6)
        sample = torch.sigmoid((torch.logit(u) + torch.logit(self.probabilities(), eps=1e-6)) / self.heat)
        with torch.no_grad():
            for z, value in zip(self.z, sample, strict=True):
                z.copy_(value)
        loss(train).backward()
        self.leaves.step()
        self.leaves.zero_grad()
        for z in self.z:
            z.grad = None
        loss(dev).backward()
        slopes = torch.stack([torch.zeros(()) if z.grad is None else z.grad.sum().cpu() for z in self.z])
        self.structure.zero_grad()
        sample.backward(slopes)
        self.structure.step()
        self.leaves.zero_grad()

    def result(self, candidates: Delta) -> Structure:
        """Take the likeliest candidates that fit into the budget."""
        p = self.probabilities().detach().tolist()
        delta, parameters = fill(candidates, self.placements, p, self.budget)
        names = [f"{candidates.terms[q.term].method} at {q.site.address}" for q in self.placements]
        return Structure(delta, parameters, dict(zip(names, p, strict=True)))


def fill(candidates: Delta, placements: Sequence[Placement], worth: Sequence[float], budget: int) -> tuple[Delta, int]:
    """Return the delta of the placements of most worth that fit into a budget, and its trained parameters.

    Raises `DeltaTuneError` when not even the smallest fits.
    """
    sizes = sizes_within(placements, budget)
    chosen, left = [], budget
    for i in sorted(range(len(sizes)), key=lambda i: -worth[i]):
        if sizes[i] <= left:
            chosen.append(i)
            left -= sizes[i]
    terms = []
    for index, term in enumerate(candidates.terms):
        sites = [placements[i].site for i in sorted(chosen) if placements[i].term == index]
        if sites:
            terms.append(Term("{" + ",".join(dict.fromkeys(map(address, sites))) + "}", term.method))
    return Delta(tuple(terms)), budget - left


def sizes_within(placements: Sequence[Placement], budget: int) -> list[int]:
    """Return the trained parameters of each placement; raises `DeltaTuneError` when not even the smallest fits."""
    sizes = [size(placement) for placement in placements]
    if budget < min(sizes):
        raise DeltaTuneError(f"a budget of {budget:,} parameters holds no candidate; the smallest has {min(sizes):,}.")
    return sizes


def solve(alpha: Tensor, sizes: Tensor, budget: float, beta: float) -> Tensor:
    """Return the shift zeta at which sum_i n_i sigmoid((alpha_i - zeta) / beta) is the budget (all candidates: minus infinity)."""
    low, high = alpha.min() - 50 * beta, alpha.max() + 50 * beta
    for _ in range(60):
        middle = (low + high) / 2
        over = (sizes * torch.sigmoid((alpha - middle) / beta)).sum() > budget
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (low + high) / 2


def address(site: Site) -> str:
    """Return a where that finds this site and no other."""
    side = ":in" if site.side == "in" else ""
    if site.part is None and site.exit is None:
        return f"path:{site.path}{side}"
    stack = f"{site.stack}." if site.stack else ""
    return f"{stack}{site.role}[{site.layer}]{side}"


def size(placement: Placement) -> int:
    """Return how many trained parameters a placement has, without the weight that a search gives it."""
    return sum(prod(leaf.shape) for name, leaf in placement.leaves.items() if leaf.trained and name != "z")
