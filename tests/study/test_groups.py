"""Studies whose runs train together: the same runs, the same numbers, and nothing done twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deltatune.cli.app import app
from deltatune.study import run_study, status
from deltatune.study.crew import Crew
from deltatune.study.store import Store
from deltatune.tuning import Run

SHORT = """batch = 4
max_input = 64
dev_limit = 4
test_limit = 4
[search]
lr = [1e-3, 3e-3]
tasks = ["agreement"]
steps = 5
"""


def found(folder: Path) -> dict[Run, Any]:
    return {run: each.result for run, each in Store(folder).found().items()}


def test_runs_that_train_together_give_the_table_that_single_runs_give(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write(tasks='"agreement"', more=SHORT)
    plan.write_text(plan.read_text().replace("steps = 20", "steps = 8"))
    assert run_study(plan, tmp_path / "alone", workers=1).complete
    with monkeypatch.context() as patch:
        patch.setattr(Crew, "idle", lambda self: pytest.fail("a run that can train with others was done alone"))
        assert run_study(plan, tmp_path / "together", together=3).complete
    alone, together = found(tmp_path / "alone"), found(tmp_path / "together")
    assert alone.keys() == together.keys() and len(alone) == 8
    for run, one in alone.items():
        assert (together[run]["dev"], together[run]["test"]) == (one["dev"], one["test"])
        assert together[run]["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    again = CliRunner().invoke(app, ["study", "run", str(plan), "--out", str(tmp_path / "together"), "--together", "3"])
    assert again.exit_code == 0 and "training" not in again.output


def test_a_group_that_cannot_be_built_is_done_run_by_run(write: Callable, tmp_path: Path) -> None:
    plan = write(tasks='"agreement"', seeds="0", more="batch = 4\nmax_input = 64\ndev_limit = 4\ntest_limit = 4\n")
    plan.write_text(
        plan.read_text().replace('Full = "Full()"', 'Full = "Full()"\nBare = "Delta()"\nWild = "LoRA(rank=1)"')
    )
    folder = tmp_path / "study"
    assert run_study(plan, folder, workers=1, together=8).complete
    assert status(folder).counts["done"] == 4
