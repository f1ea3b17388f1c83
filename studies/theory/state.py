"""What the study has done so far: finished runs and measurements, which are never done again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from deltatune import tuning
from deltatune.backbones import Backbone, load
from deltatune.core.weights import Weights
from deltatune.files import read_json, write_json
from deltatune.tuning import Run
from deltatune.tuning.environment import environment
from studies.theory.plan import Choice, Plan


@dataclass(frozen=True)
class State:
    """A plan and the folder that holds its runs and measurements."""

    plan: Plan
    folder: Path

    @property
    def runs(self) -> Path:
        """Where runs lie, each under its id."""
        return self.folder / "runs"

    def tune(self, run: Run) -> dict[str, Any]:
        """Return the result of a run, trained now unless it is finished."""
        started = time.strftime("%H:%M:%S")
        known = self.has(run)
        result = tuning.tune(run, self.runs / run.id)
        if not known:
            print(
                f"{started} {run.delta[:60]} {run.task} {run.seed}: {result['dev'] or result['test']:.1f}", flush=True
            )
        return result

    def has(self, run: Run) -> bool:
        """Whether a run is finished."""
        return (self.runs / run.id / "result.json").exists()

    def weights(self, run: Run) -> Weights:
        """Return what a finished run trained."""
        return Weights.read(self.runs / run.id)

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return what `measure` gave, measured now unless it was before."""
        path = self.folder / "measured" / f"{name}.json"
        if not path.exists():
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"value": measure(), "environment": environment()})
        return read_json(path)["value"]

    def known(self, prefix: str) -> dict[str, Any]:
        """Return the measurements whose name begins so, by the rest of the name."""
        paths = sorted((self.folder / "measured").glob(f"{prefix}*.json"))
        return {path.stem.removeprefix(prefix): read_json(path)["value"] for path in paths}

    def chosen(self, name: str) -> Choice:
        """Return a method's delta and rate: as the plan has them, or the best of its search."""
        if name in self.plan.methods:
            return self.plan.methods[name]
        tried = [(self.tune(run)["dev"], choice) for choice, run in self.plan.searched()[name]]
        return max(tried, key=lambda pair: pair[0])[1]

    def rates(self) -> dict[int, float]:
        """Return the rates of SAID that were found, by dimension."""
        return {at: self.chosen(f"SAID {at}").lr for at in self.plan.intrinsic["at"]}

    def methods(self) -> dict[str, Choice]:
        """Return all methods that are compared."""
        return {**self.plan.methods, "PrefixTuning": self.chosen("PrefixTuning")}

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone that is measured, loaded once."""
        return load(self.plan.backbone)
