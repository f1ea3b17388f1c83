"""Reading a study's directory into `Results`; needs neither the data nor the models, only what the runs wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.files import read_json
from deltatune.study.items import item_scores
from deltatune.study.plan import Cell, Entry, Plan
from deltatune.study.results import Choice, Gap, Measured, Record, Results, from_json
from deltatune.study.status import Line, Status, status
from deltatune.study.store import Found, Store

if TYPE_CHECKING:
    from deltatune.tuning import Run

LOSS_POINTS = 40
# What a record takes over from result.json under the same name.
SAME = ("metric", "dev", "majority", "train_loss", "best_step", "steps", "stopped", "parameters", "backbone_parameters")
SAME += ("file_bytes", "step_seconds", "tokens", "tokens_per_second", "peak_memory_bytes")


def read(path: Path | str) -> Results:
    """The results in a study's directory or in a results.json; raises `DeltaTuneError` when it is neither."""
    path = Path(path)
    return collect(path) if path.is_dir() else from_json(path)


def collect(folder: Path) -> Results:
    """The results in a study's directory; needs neither the data nor the models."""
    store = Store(folder)
    plan, manifest, now, found = store.plan(), store.manifest(), status(folder), store.found()
    done = [(line.entry, line.found.id, line.found.result) for line in now.lines if line.found and line.found.result]
    environments = {_key(result["environment"]): result["environment"] for _, _, result in done}
    used = {line.found.id for line in now.lines if line.found}
    return Results(
        name=plan.name,
        plan=plan.text,
        methods={label: method.written or method.delta for label, method in plan.methods.items()},
        baseline=plan.baseline,
        backbones={name: manifest["backbones"][name] for name in plan.backbones},
        tasks={name: manifest["tasks"][name] for name in plan.tasks},
        environments=dict(sorted(environments.items())),
        records=[_record(store.run_folder(id), entry, id, result) for entry, id, result in done],
        gaps=_gaps(now),
        choices=_choices(plan, found),
        unplanned=sum(1 for each in found.values() if each.id not in used),
        theory=_measured(store, [id for entry, id, _ in done if entry.part == "final"], plan.theory),
    )


def _measured(store: Store, ids: Sequence[str], names: Sequence[str]) -> list[Measured]:
    """What the instruments found in the runs, without the tables and plots that stand in their own files."""
    paths = [(id, name, store.measurement(id, name)) for name in names for id in ids]
    rows = [(id, name, read_json(path)) for id, name, path in paths if path.exists()]
    return [
        Measured(id, name, row.get("finding", ""), row.get("profiles", {}), row.get("refused", ""))
        for id, name, row in rows
    ]


def _record(folder: Path, entry: Entry, id: str, result: Mapping[str, Any]) -> Record:
    run, final = entry.run, entry.part == "final"
    log = _lines(folder / "log.jsonl")
    ids, items = item_scores(result["metric"], _lines(folder / "predictions.jsonl")) if final else ("", [])
    return Record(
        id=id,
        part=entry.part,
        method=entry.method,
        delta=run.delta,
        backbone=run.backbone,
        task=run.task,
        seed=run.seed,
        recipe=run.recipe.to_json(),
        # A candidate's test score is never looked at, so that no choice can come from it.
        test=result["test"] if final else None,
        train_seconds=result["seconds"]["train"],
        evaluate_seconds=result["seconds"]["evaluate"],
        total_seconds=result["seconds"]["total"],
        environment=_key(result["environment"]),
        curve=[[row["step"], round(row["dev"], 4)] for row in log if "dev" in row],
        loss=_thin([[row["step"], round(row["loss"], 4)] for row in log if "loss" in row]),
        items=items,
        item_ids=ids,
        **{name: result[name] for name in SAME},
    )


def _choices(plan: Plan, found: Mapping[Run, Found]) -> list[Choice]:
    """One choice for each method and backbone, and for each task where tasks are searched by themselves."""
    dev = {run: each.dev for run, each in found.items() if each.settled}
    choices: dict[tuple[str, str, tuple[str, ...]], Choice] = {}
    for cell, block in plan.cells():
        by_rate = plan.candidates(cell, block)
        tasks = tuple(entry.run.task for entry in next(iter(by_rate.values()), []))
        if tasks and (cell.method, cell.backbone, tasks) not in choices:
            tried = [(rate, _mean_dev(entries, found), _ids(entries, found)) for rate, entries in by_rate.items()]
            chosen = plan.choose(cell, block, dev)
            choices[cell.method, cell.backbone, tasks] = Choice(cell.method, cell.backbone, tasks, tried, chosen)
    return list(choices.values())


def _mean_dev(entries: Sequence[Entry], found: Mapping[Run, Found]) -> float | None:
    scores = [found[entry.run].dev for entry in entries if entry.run in found]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(entries) else None


def _ids(entries: Sequence[Entry], found: Mapping[Run, Found]) -> list[str]:
    return [found[entry.run].id for entry in entries if entry.run in found and found[entry.run].result]


def _gaps(now: Status) -> list[Gap]:
    begun = [
        Gap(line.found.id if line.found else "", line.entry.part, *_cell(line), line.state, line.reason)
        for line in now.lines
        if line.state != "done"
    ]
    return begun + [
        Gap("", "final", *_fields(cell), "pending", "its search has not found a learning rate")
        for cell in now.undecided
    ]


def _cell(line: Line) -> tuple[str, str, str, int]:
    run = line.entry.run
    return line.entry.method, run.backbone, run.task, run.seed


def _fields(cell: Cell) -> tuple[str, str, str, int]:
    return cell.method, cell.backbone, cell.task, cell.seed


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _thin(points: list[list[float]]) -> list[list[float]]:
    """At most `LOSS_POINTS` of the points, evenly spread, each the mean of its stretch."""
    size = -(-len(points) // LOSS_POINTS)
    stretches = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [[part[-1][0], round(sum(loss for _, loss in part) / len(part), 4)] for part in stretches]


def _key(environment: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:8]
