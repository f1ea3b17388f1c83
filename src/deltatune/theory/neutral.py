"""The neutral-delta check: a fresh delta leaves the model's function unchanged (Ding et al., 2022, section 4.1).

F~(theta, delta_0) = F(theta)        measured as max |f~(x) - f(x)| / max |f(x)| over the scores of all batches
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltatune.core.attach import attach
from deltatune.core.delta import Delta, as_delta
from deltatune.core.method import Method
from deltatune.core.weights import init
from deltatune.theory.finding import Finding
from deltatune.theory.sides import Batch, check_some, evaluating, real, scores

TOLERANCE = 1e-5  # float32 rounding through a few dozen layers, relative to the largest score


@dataclass(frozen=True)
class Neutrality(Finding):
    """How far a fresh delta is from neutral: `apart`, the largest difference of a score, and `size`, the largest score.

    `reasons` are those that the delta's methods declare for not starting neutral.
    """

    delta: str
    apart: float
    size: float
    batches: int
    tolerance: float = TOLERANCE
    reasons: tuple[str, ...] = ()

    @property
    def neutral(self) -> bool:
        """Whether F~(theta, delta_0) = F(theta) on the batches, within the tolerance."""
        return self.apart <= self.tolerance * self.size

    @property
    def finding(self) -> str:
        share = f"{self.apart / self.size:.2g} of the largest score" if self.size else f"{self.apart:.2g}"
        if self.neutral:
            return f"{self.delta} starts neutral: over {self.batches} batches no score moves by more than {share}."
        why = f", as declared: {'; '.join(self.reasons)}" if self.reasons else ""
        return f"{self.delta} does not start neutral: a score moves by {share}{why}."


@torch.no_grad()
def check_neutral(
    model: nn.Module,
    delta: Delta | Method,
    batches: Iterable[Batch],
    seed: int = 0,
    evidence: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> Neutrality:
    """Return how far fresh weights of `delta` are from leaving the scores [rows, length, classes] of the batches as they are.

    Raises `DeltaTuneError` when there are no batches, and as `init` does.
    """
    delta = as_delta(delta)
    weights = init(delta, model, seed, evidence)
    apart = size = 0.0
    count = 0
    with evaluating(model):
        for batch in batches:
            before = scores(model(**batch))
            with attach(model, weights):
                after = scores(model(**batch))
            kept = real(model, batch, before.shape[:-1]).to(before.device)
            apart = max(apart, float((after - before)[kept].abs().max()))
            size = max(size, float(before[kept].abs().max()))
            count += 1
    check_some(count)
    reasons = (term.method.breaks.get("identity") for term in delta.terms)
    return Neutrality(str(delta), apart, size, count, tolerance, tuple(dict.fromkeys(filter(None, reasons))))
