"""What a run's log says about its steps."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Steps = Sequence[dict[str, Any]]


def steps_of(path: Path) -> Steps:
    """Return the lines of a log that tell of a training step."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [line for line in lines if "loss" in line]


def ended(steps: Steps) -> dict[str, float | None]:
    """Return the loss at the end (mean of the last 50 steps) and the median seconds of a step."""
    return {
        "train_loss": statistics.fmean(line["loss"] for line in steps[-50:]) if steps else None,
        "step_seconds": statistics.median(line["seconds"] for line in steps) if steps else None,
    }


@dataclass(frozen=True)
class Longest:
    """The seconds planned for a step on the longest batch, and the numbers of the steps on batches of its size."""

    planned: float | None
    steps: frozenset[int]

    def beside(self, steps: Steps) -> dict[str, float | None]:
        """Return them beside the median of those steps."""
        found = [line["seconds"] for line in steps if line["step"] in self.steps]
        return {"planned": self.planned, "measured": statistics.median(found) if found else None}
