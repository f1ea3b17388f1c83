"""One directory per study, in which several processes and several commands work at once without doing a run twice.

    <study>/plan.toml          the plan as last issued
    <study>/study.json         name, and the facts and digests of the tasks and backbones that the results belong to
    <study>/runs/<id>/         one run, written by `deltatune.tuning.tune`; `lock` is held while a process works on it
    <study>/runs/<id>/theory/  what the instruments found that the plan asks for, one JSON file each

A lock is an operating system's lock on an open file, so it ends with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltatune.errors import DeltaTuneError
from deltatune.files import read_json, write_json, write_text
from deltatune.study.plan import Plan

if TYPE_CHECKING:
    from deltatune.tuning import Run

THEORY = "theory"
State = Literal["pending", "running", "done", "failed"]
FORMAT = 1


@dataclass(frozen=True)
class Found:
    """What a directory holds about a run: its result, why it failed (`error` and `message`), and if it is `measured`."""

    id: str
    result: Mapping[str, Any] | None
    failure: Mapping[str, Any] | None
    measured: bool = True

    @property
    def dev(self) -> float | None:
        """The dev score of a finished run, else None."""
        return self.result["dev"] if self.result else None

    @property
    def settled(self) -> bool:
        """True when there is nothing left to do: done or failed."""
        return (self.result is not None and self.measured) or self.failure is not None


class Store:
    """The directory of a study, in which a final run is done when the instruments that are `asked` have measured it."""

    def __init__(self, folder: Path | str, asked: Sequence[str] = ()) -> None:
        self.folder, self.asked = Path(folder), tuple(asked)

    def open(self, plan: Plan, inputs: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the directory or take up the one that is there; raises when it belongs to another study or other inputs."""
        manifest = self.folder / "study.json"
        known = self.manifest() if manifest.exists() else {"name": plan.name, "tasks": {}, "backbones": {}}
        if known["name"] != plan.name:
            raise DeltaTuneError(
                f"{self.folder} holds the study {known['name']!r}, but the plan is named {plan.name!r}; "
                "choose another folder with --out, or give the plan the same name to extend that study."
            )
        for kind in ("tasks", "backbones"):
            self._same_digests(known[kind], inputs[kind])
        merged = {kind: {**known[kind], **inputs[kind]} for kind in ("tasks", "backbones")}
        write_json(manifest, {"format": FORMAT, "name": plan.name, **merged})
        write_text(self.folder / "plan.toml", plan.text)

    def holds(self, plan: Plan) -> bool:
        """True when the directory was last opened with exactly this plan."""
        path = self.folder / "plan.toml"
        return path.exists() and path.read_text(encoding="utf-8") == plan.text

    def _same_digests(self, known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in known.keys() & now.keys():
            then, today = known[name]["digest"][:12], now[name]["digest"][:12]
            if then != today:
                raise DeltaTuneError(
                    f"{name!r} has changed since the study in {self.folder} was begun (digest {then} then, {today} now), "
                    "so old and new results would not compare; choose another folder with --out."
                )

    def manifest(self) -> dict[str, Any]:
        """What `study.json` says; raises `DeltaTuneError` when the folder holds no study."""
        path = self.folder / "study.json"
        if not path.exists():
            raise DeltaTuneError(
                f"{self.folder} holds no study (there is no study.json); `deltatune study run` makes one."
            )
        manifest = read_json(path)
        if manifest.get("format") != FORMAT:
            raise DeltaTuneError(
                f"{path} has format {manifest.get('format')!r}, but this version reads format {FORMAT}."
            )
        return manifest

    def plan(self) -> Plan:
        """The plan as last issued for this directory."""
        self.manifest()
        return Plan.read(self.folder / "plan.toml")

    def run_folder(self, id: str) -> Path:
        """Where a run keeps its files."""
        return self.folder / "runs" / id

    def find(self, id: str) -> Found:
        """What there is about the run with this id."""
        folder = self.run_folder(id)
        result, failure = folder / "result.json", folder / "failure.json"
        measured = not self.unmeasured(id)
        if result.exists() and measured:
            return Found(id, read_json(result), None)
        failed = read_json(failure) if failure.exists() else None
        return Found(id, read_json(result) if result.exists() else None, failed, measured)

    def unmeasured(self, id: str) -> list[str]:
        """The instruments that have still to measure a trained run; a run that is not tested, as in a search, is not measured."""
        folder = self.run_folder(id)
        if not self.asked or not (folder / "result.json").exists():
            return []
        tested = read_json(folder / "result.json")["run"]["recipe"]["test"]
        return [name for name in self.asked if tested and not self.measurement(id, name).exists()]

    def measurement(self, id: str, name: str) -> Path:
        """Where stands what an instrument found in a run."""
        return self.run_folder(id) / THEORY / f"{name}.json"

    def keep(self, id: str, name: str, found: Mapping[str, Any]) -> None:
        """Record what an instrument found in a run."""
        write_text(self.measurement(id, name), json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n")

    def found(self) -> dict[Run, Found]:
        """Every run that was begun in the directory, those of earlier plans included.

        Another version of the software may give a run another id; of two folders with the same run the later one counts.
        It may also give a method other defaults: a run that was done with those of its time is another one. A run whose
        method or setting is gone stays in its folder; a plan that asks for it says so itself.
        """
        paths = sorted((self.folder / "runs").glob("*/run.json"), key=lambda path: (path.stat().st_mtime_ns, path))
        records = {path.parent.name: read_json(path) for path in paths}
        runs = {id: run for id, record in records.items() if (run := _known(record)) and run.means(record)}
        return {run: self.find(id) for id, run in runs.items()}

    def dev_scores(self, plan: Plan) -> dict[Run, float | None]:
        """The dev score of every finished search run, None where it failed."""
        found = self.found()
        searched = {entry.run: found[entry.run] for entry in plan.search_runs() if entry.run in found}
        return {run: each.dev for run, each in searched.items() if each.settled}

    def begin(self, run: Run) -> None:
        """Record what a run is, so that the directory explains itself without the data that the id is made from."""
        path = self.run_folder(run.id) / "run.json"
        if not path.exists():
            write_json(path, run.record())

    def fail(self, id: str, error: str, message: str) -> None:
        """Record that a run failed."""
        write_json(self.run_folder(id) / "failure.json", {"error": error, "message": message})

    def forgive(self, id: str) -> None:
        """Make a failed run pending again."""
        (self.run_folder(id) / "failure.json").unlink(missing_ok=True)

    def state(self, id: str) -> State:
        """The state of a run; a run whose process died is pending."""
        folder = self.run_folder(id)
        if (folder / "result.json").exists() and not self.unmeasured(id):
            return "done"
        if (folder / "failure.json").exists():
            return "failed"
        return "running" if self._locked(id) else "pending"

    @contextmanager
    def claim(self, id: str) -> Iterator[bool]:
        """Take a run for this process: True inside the `with` when nobody else has it, False at once otherwise."""
        folder = self.run_folder(id)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _locked(self, id: str) -> bool:
        path = self.run_folder(id) / "lock"
        if not path.exists():
            return False
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def _known(record: Mapping[str, Any]) -> Run | None:
    """Return the run of a record, None where this version of the software does not know what it says."""
    from deltatune.tuning import Run

    try:
        return Run.of_record(record)
    except DeltaTuneError:
        return None
