"""What a plan reads, looked up before anything runs: tasks, backbones, and the places of each delta in each backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltatune.errors import DeltaTuneError, nearest
from deltatune.study.plan import Plan


def inspect(plan: Plan) -> dict[str, dict[str, dict[str, Any]]]:
    """The facts about the plan's tasks and backbones by name; raises `DeltaTuneError` listing every name that is unknown."""
    problems: list[str] = []
    found: dict[str, dict[str, dict[str, Any]]] = {"tasks": {}, "backbones": {}}
    for kind, names, look_up in (("tasks", plan.tasks, _task), ("backbones", plan.backbones, _backbone)):
        for name in names:
            try:
                found[kind][name] = look_up(name)
            except DeltaTuneError as error:
                problems.append(f"{kind}: {error}")
    _refuse(plan, problems)
    return found


def check_instruments(plan: Plan, known: Sequence[str]) -> None:
    """Raise `DeltaTuneError` for instruments that the plan asks for and that there are not."""
    offers = f" Known: {', '.join(known)}." if known else " None was given: run_study(..., measure=...) takes them."
    unknown = [name for name in plan.theory if name not in known]
    _refuse(plan, [f"theory: there is no instrument {name!r}.{nearest(name, known)}{offers}" for name in unknown])


def check_places(plan: Plan) -> None:
    """Find the places of every delta in every backbone without reading a weight; raises `DeltaTuneError` where one has none."""
    import deltatune as dt
    from deltatune.backbones import skeleton

    problems: list[str] = []
    for backbone in plan.backbones:
        model = skeleton(backbone)
        for label, method in plan.methods.items():
            try:
                dt.sites(model, dt.parse(method.delta))
            except DeltaTuneError as error:
                problems.append(f"{label} on {backbone}: {error}")
    _refuse(plan, problems)


def _refuse(plan: Plan, problems: list[str]) -> None:
    if problems:
        raise DeltaTuneError("\n".join([f"the plan {plan.name!r} cannot start:", *problems]))


def _task(name: str) -> dict[str, Any]:
    from deltatune.tasks import task

    found = task(name)
    return {
        "digest": found.digest,
        "kind": found.kind,
        "metric": found.metric,
        "category": found.category,
        "licence": found.licence,
        "version": found.version,
    }


def _backbone(name: str) -> dict[str, Any]:
    from deltatune.backbones import digest

    return {"digest": digest(name)}
