"""Everything a report needs, as one value that is also a JSON file small enough for git."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.errors import DeltaTuneError
from deltatune.files import read_json

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One finished run. `dev` is None without dev evaluations, `curve` is (step, dev score), `loss` (step, train loss)
    thinned, `items` the test score of each item.

    Times are in seconds, sizes in bytes, scores in percent; `environment` is a key of `Results.environments`, and
    `item_ids` tells whether two runs were tested on the same items.
    """

    id: str
    part: str
    method: str
    delta: str
    backbone: str
    task: str
    seed: int
    recipe: Mapping[str, Any]
    metric: str
    test: float | None
    dev: float | None
    majority: float | None
    train_loss: float | None
    best_step: int
    steps: int
    stopped: str
    parameters: int
    backbone_parameters: int
    file_bytes: int
    train_seconds: float
    evaluate_seconds: float
    total_seconds: float
    step_seconds: float | None
    tokens: int
    tokens_per_second: float | None
    peak_memory_bytes: int
    environment: str
    curve: Sequence[Sequence[float]]
    loss: Sequence[Sequence[float]]
    items: Sequence[int]
    item_ids: str


@dataclass(frozen=True)
class Gap:
    """A run that the plan asks for and that has no result; `reason` says why it failed, if it did."""

    id: str
    part: str
    method: str
    backbone: str
    task: str
    seed: int
    state: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """A search: the learning rates tried for a method on the `tasks`, and the one that was taken, if any is yet.

    `candidates` are (learning rate, mean dev score or None, ids of the finished runs).
    """

    method: str
    backbone: str
    tasks: Sequence[str]
    candidates: Sequence[tuple[float, float | None, Sequence[str]]]
    chosen: float | None


@dataclass(frozen=True)
class Measured:
    """What an instrument of `deltatune.theory` found in the run `id`, or why it `refused`.

    `profiles` has numbers by quantity and then by place, a layer for example.
    """

    id: str
    instrument: str
    finding: str
    profiles: Mapping[str, Mapping[str, float | None]]
    refused: str = ""


@dataclass(frozen=True)
class Results:
    """A study's results: its plan, the facts about its inputs, its finished runs, what is missing, and what was measured."""

    name: str
    plan: str
    methods: Mapping[str, str]
    baseline: str | None
    backbones: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    environments: Mapping[str, Mapping[str, Any]]
    records: Sequence[Record]
    gaps: Sequence[Gap]
    choices: Sequence[Choice]
    unplanned: int
    theory: Sequence[Measured] = ()

    def category(self, task: str) -> str:
        """The category of a task; "other" where it has none."""
        return self.tasks[task]["category"] or "other"

    @property
    def final(self) -> list[Record]:
        """The runs that the tables show."""
        return [record for record in self.records if record.part == "final"]

    @property
    def search(self) -> list[Record]:
        """The candidates of the search, judged on dev only."""
        return [record for record in self.records if record.part == "search"]


def to_json(results: Results) -> str:
    """The results as JSON, one run a line, so that a changed run is one changed line in git."""
    data = {"format": FORMAT, **_plain(results)}
    rows = {name: data.pop(name) for name in ("choices", "records", "gaps", "theory")}
    if not rows["theory"]:
        del rows["theory"]
    head = json.dumps(data, indent=1, ensure_ascii=False)[:-2]
    lists = (f' "{name}": [\n' + ",\n".join(map(_compact, items)) + "\n ]" for name, items in rows.items())
    return head + ",\n" + ",\n".join(lists) + "\n}\n"


def _plain(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def from_json(path: Path) -> Results:
    """Read what `to_json` wrote; raises `DeltaTuneError` when the file is something else."""
    data = read_json(path)
    if not isinstance(data, dict) or "records" not in data:
        raise DeltaTuneError(f"{path} is not a results.json of a study; `deltatune study report <folder>` writes one.")
    if data.pop("format") != FORMAT:
        raise DeltaTuneError(f"{path} has another format than this version reads ({FORMAT}).")
    choices = [Choice(**choice) for choice in data.pop("choices")]
    rows = {"records": [Record(**row) for row in data.pop("records")], "gaps": [Gap(**row) for row in data.pop("gaps")]}
    measured = [Measured(**row) for row in data.pop("theory", [])]
    return Results(**data, choices=choices, theory=measured, **rows)
