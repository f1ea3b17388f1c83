"""What a plan reads, looked up before anything runs: tasks, backbones, and the places of each delta in each backbone."""

from __future__ import annotations

from typing import Any

from deltatune.errors import DeltaTuneError
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
