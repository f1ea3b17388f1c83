"""`control`: the backbone with a delta as a controlled system, step by step, and what kind of controller the delta is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from statistics import fmean
from typing import Any, TypeVar

from deltatune.core.attach import Attachment, attach
from deltatune.theory.backbone import BackboneDynamics
from deltatune.theory.control import ControlReport, StepReport, control_report
from deltatune.theory.controllability import Controllability, Reach, controllability
from deltatune.theory.exhibit import Exhibit, Lines, Table, by_place
from deltatune.theory.feedback import loops
from deltatune.theory.sides import Batch, own_loss, trained
from deltatune.theory.subject import Subject

LOOPS = {"open": "open loop", "linear": "closed loop, linear feedback", "nonlinear": "closed loop, nonlinear feedback"}
StepLike = TypeVar("StepLike", StepReport, Reach)


def control(subject: Subject, radius: float = 0.1, ascents: int = 4, probes: int = 4) -> Exhibit:
    """Measure every step of the first delta's backbone, means over the batches of the sample, which are run one by one."""
    with attach(subject.model, subject.first) as attached:
        trained(attached)
        pairs = [_measured(attached, batch, radius, ascents, probes) for batch in subject.batches]
        kinds = {text: LOOPS[loop] for text, loop in loops(attached).items()}
    reports, reaches = zip(*pairs, strict=True)
    report = ControlReport(fmean(r.loss for r in reports), _means([r.steps for r in reports], subject))
    reach = Controllability(_means([r.steps for r in reaches], subject))
    profiles: dict[str, dict[str, float | None]] = {
        "violation of Pontryagin's condition": {s.name: s.violation for s in report.steps if s.violation is not None},
        "control energy": {s.name: s.energy for s in report.steps if s.energy is not None},
        "controllability, trace of the Gramian": {s.name: s.trace for s in reach.steps if s.parameters},
    }
    return Exhibit(
        "control",
        {**subject.about, **subject.data, **{f"Loop of {text}": kind for text, kind in kinds.items()}},
        [report, reach],
        [_steps(report, reach)],
        [*(_chart(name, values) for name, values in profiles.items()), _gramians(reach)],
        profiles,
    )


def _measured(
    attached: Attachment, batch: Batch, radius: float, ascents: int, probes: int
) -> tuple[ControlReport, Controllability]:
    system = BackboneDynamics(attached, lambda: own_loss(attached.model(**batch)))
    return control_report(system, radius, ascents), controllability(system, probes)


def _means(batches: Sequence[Sequence[StepLike]], subject: Subject) -> tuple[StepLike, ...]:
    """Return the steps with the means of their numbers over the batches, named by their blocks."""
    return tuple(_mean(steps, subject) for steps in zip(*batches, strict=True))


def _mean(steps: Sequence[StepLike], subject: Subject) -> StepLike:
    first = steps[0]
    means: dict[str, Any] = {f.name: _average([vars(s)[f.name] for s in steps]) for f in fields(first)[2:]}
    name = first.name.removeprefix("stack: ") if first.name.endswith("embeddings") else subject.layer(first.name)
    return type(first)(name, first.parameters, **means)


def _average(values: Sequence[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(map(fmean, zip(*values, strict=True)))
    return None if None in values else fmean(values)


def _steps(report: ControlReport, reach: Controllability) -> Table:
    rows = [
        (
            s.name,
            s.parameters,
            s.hamiltonian,
            s.violation,
            s.energy,
            s.share,
            s.costate,
            r.trace,
            r.per_parameter,
            r.effective_rank,
        )
        for s, r in zip(report.steps, reach.steps, strict=True)
    ]
    columns = ("step", "controls", "Hamiltonian", "violation", "energy", "share of the step", "|co-state|")
    columns += ("Gramian's trace", "for each control", "effective rank")
    return Table("Each step", columns, tuple(rows))


def _chart(name: str, values: Mapping[str, float | None]) -> Lines:
    return by_place(name[:1].upper() + name[1:], name.partition(",")[0].partition(" of ")[0], {name: values})


def _gramians(reach: Controllability) -> Lines:
    series = {s.name: [(k, v) for k, v in enumerate(s.spectrum, 1) if v > 0] for s in reach.steps if s.parameters}
    return Lines("Spectra of the Gramians, as the probes see them", "k", "eigenvalue", series, "y")
