"""The bound of the solution-space view, checked along a segment (Ding et al., 2022, section 4.1).

    gap = |F(psi(delta')) - F(theta+)| <= L |eps|_2        eps = theta+ - psi(delta')
    x(t) = psi(delta') + t eps, t in [0, 1]                L = max_t |grad F(x(t))|_2

The mean value theorem asks for no more than the slopes along the segment, dF/dt = grad F(x(t)) . eps, whose largest one gives
the tighter bound `max_t |dF/dt|`. Both maxima are over the points that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

from torch import nn

from deltatune.core.attach import Attachment, attach
from deltatune.core.convert import changes, written
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.theory.finding import Finding
from deltatune.theory.landscape import line, move
from deltatune.theory.reach import Family, nearest_change
from deltatune.theory.residual import once, owners
from deltatune.theory.sides import Batch, Loss, check_some, evaluating, own_loss

POINTS = 11
ROUNDING = 1e-6  # of the losses' size
Point = tuple[float, float, float]  # F, |grad F|, dF/dt


@dataclass(frozen=True)
class SegmentBound(Finding):
    """F, |grad F| and dF/dt at each t from psi(delta') (t = 0) to theta+ (t = 1), and |eps|."""

    at: tuple[float, ...]
    losses: tuple[float, ...]
    gradients: tuple[float, ...]
    slopes: tuple[float, ...]
    distance: float

    @property
    def gap(self) -> float:
        """|F(psi(delta')) - F(theta+)|."""
        return abs(self.losses[0] - self.losses[-1])

    @property
    def bound(self) -> float:
        """L |eps|, L the largest gradient norm on the segment."""
        return max(self.gradients) * self.distance

    @property
    def tight(self) -> float:
        """The largest |dF/dt| on the segment."""
        return max(map(abs, self.slopes))

    @property
    def holds(self) -> bool:
        """Whether gap <= L |eps|, up to the rounding of the losses."""
        return self.gap <= self.bound + ROUNDING * max(map(abs, self.losses))

    @property
    def finding(self) -> str:
        says = "holds" if self.holds else f"fails at {len(self.at)} points (look at more of them)"
        return (
            f"gap <= L |eps| {says}: {self.gap:.3g} <= {self.bound:.3g} with |eps| = {self.distance:.3g}; "
            f"the slopes along the segment alone give {self.tight:.3g}."
        )


def check_segment(at: Callable[[float], Point], distance: float, points: int = POINTS) -> SegmentBound:
    """Return the bound of a function given by its value, gradient norm and slope at t, on `points` even points of [0, 1]."""
    if points < 2:
        raise DeltaTuneError(f"{points} points are no segment; write at least 2, its ends.")
    ts = tuple(i / (points - 1) for i in range(points))
    losses, gradients, slopes = zip(*map(at, ts), strict=True)
    return SegmentBound(ts, losses, gradients, slopes, distance)


def check_bound(
    model: nn.Module,
    tuned: Weights,
    family: Family,
    batches: Sequence[Batch],
    loss: Loss = own_loss,
    points: int = POINTS,
    seed: int = 0,
    evidence: Mapping[str, Any] | None = None,
    tolerance: float = 0.05,
) -> SegmentBound:
    """Return the bound between what `tuned` (Full, or any mergeable delta) made of the backbone and the nearest point of a family.

    F is the mean of the batches' losses. Holds the parameters that change three times, as float32; `tolerance` is the
    share of its change that a parameter may lose to that. Raises `DeltaTuneError` as `residuals` does.
    """
    exact = changes(model, tuned)
    near = nearest_change(model, family, once(model, exact), seed, evidence)
    ends = {name: near[first] for name, first in owners(model, exact).items()}, exact
    begin, end = (written(model, changed, [tuned], None, tolerance)[0] for changed in ends)
    return bound_between(model, begin, end, batches, loss, points)


def bound_between(
    model: nn.Module,
    begin: Weights,
    end: Weights,
    batches: Sequence[Batch],
    loss: Loss = own_loss,
    points: int = POINTS,
) -> SegmentBound:
    """Return the bound along the segment between two weights of one delta: values of parameters, where |eps| is to be in these."""
    check_some(batches)
    between = line(model, begin, end)
    distance = hypot(*(float((b - a).double().norm()) for a, b in between.values()))
    with evaluating(model), attach(model, begin) as attached:

        def at(t: float) -> Point:
            move(attached, between, t)
            return _point(attached, between, batches, loss)

        return check_segment(at, distance, points)


def _point(attached: Attachment, between: Mapping[str, Any], batches: Sequence[Batch], loss: Loss) -> Point:
    attached.leaves.zero_grad()
    total = 0.0
    for batch in batches:
        value = loss(attached.model(**batch)) / len(batches)
        value.backward()
        total += float(value.detach())
    squares = slope = 0.0
    for name, parameter in attached.named_parameters():
        if parameter.grad is not None:
            a, b = between[name]
            squares += float(parameter.grad.double().square().sum())
            slope += float((parameter.grad * (b - a).to(parameter.device)).double().sum())
    attached.leaves.zero_grad()
    return total, squares**0.5, slope
