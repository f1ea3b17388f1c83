"""`landscape`: the loss around a delta's weights, how sharply it curves there, and how it goes on the way to a second delta."""

from __future__ import annotations

from deltatune.core.attach import attach
from deltatune.theory.curvature import Sharpness, sharpness
from deltatune.theory.exhibit import Exhibit, Lines, Surface, Table
from deltatune.theory.landscape import Interpolation, as_values, interpolate, plane
from deltatune.theory.subject import Subject


def landscape(
    subject: Subject, radius: float = 1.0, points: int = 9, eigenvalues: int = 5, steps: int | None = None
) -> Exhibit:
    """Measure the loss on a random plane through the first delta's leaves and its Hessian's largest eigenvalues there."""
    model, batches, first = subject.model, subject.batches, subject.first
    between = _between(subject)
    with attach(model, first) as attached:
        curved = sharpness(attached, batches, eigenvalues, steps, seed=subject.sample.seed)
        around = plane(attached, batches, radius, points, seed=subject.sample.seed)
    unit = "row norms"
    charts = [
        Surface("The loss around the weights", f"direction 1, {unit}", f"direction 2, {unit}", around.at, around.losses)
    ]
    middle = list(zip(around.at, around.losses[len(around.at) // 2], strict=True))
    slices = {
        "direction 2": middle,
        "direction 1": [(x, row[len(row) // 2]) for x, row in zip(around.at, around.losses, strict=True)],
    }
    lines = [Lines("Through the weights", unit, "loss", slices)] + ([_way(between)] if between else [])
    return Exhibit(
        "landscape",
        {**subject.about, **subject.data},
        [curved, around, *([between] if between else [])],
        [_eigenvalues(curved), *([_losses(between)] if between else [])],
        [*charts, *lines],
        {"largest Hessian eigenvalues": {f"eigenvalue {i}": value for i, value in enumerate(curved.values, start=1)}},
    )


def _between(subject: Subject) -> Interpolation | None:
    """The loss between the first two deltas, by their leaves where they are alike, else by the weights that they make."""
    if len(subject.deltas) < 2:
        return None
    a, b = list(subject.deltas.values())[:2]
    ends = (a, b) if a.delta == b.delta and a.seed == b.seed else as_values(subject.model, a, b)
    return interpolate(subject.model, *ends, subject.batches)


def _eigenvalues(curved: Sharpness) -> Table:
    rows = [(f"eigenvalue {i}", v, r) for i, (v, r) in enumerate(zip(curved.values, curved.residuals, strict=True), 1)]
    rows += [("least that was seen", curved.least, None), ("norm of the gradient", curved.gradient, None)]
    return Table("The Hessian at the weights", ("quantity", "value", "residual"), tuple(rows))


def _losses(between: Interpolation) -> Table:
    rows = tuple(zip((f"{t:.2f}" for t in between.at), between.losses, strict=True))
    return Table("Between the two", ("t", "loss"), rows)


def _way(between: Interpolation) -> Lines:
    return Lines("Between the two", "t", "loss", {"loss": list(zip(between.at, between.losses, strict=True))})
