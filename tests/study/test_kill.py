"""A study that is killed ten times gives the result table of an undisturbed one. Real processes, real training, about 2 minutes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deltatune.study.collect import collect

KILLS = 10
LIMIT = 600.0
# What a clock or the system decides, so that it differs between any two runs.
MEASURED = {
    "train_seconds",
    "evaluate_seconds",
    "total_seconds",
    "step_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
}
MORE = """
checkpoint_every = 4
batch = 4
dev_limit = 12
test_limit = 24
max_input = 48
dropout = true

[search]
lr = [1e-3, 1e-2]
tasks = ["sentiment"]
steps = 10
"""


def command(plan: Path, folder: Path, models: Path, workers: int) -> subprocess.Popen[bytes]:
    """`deltatune study run` in a process group of its own."""
    arguments = ["study", "run", str(plan), "--out", str(folder), "--workers", str(workers)]
    environment = {**os.environ, "DELTATUNE_MODELS": str(models), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-m", "deltatune.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Let a command end, and show what it said unless it ended well."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        kill(process)
    assert process.returncode == 0, output.decode()


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and all its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def written(folder: Path) -> int:
    """Bytes logged by training so far: what tells that steps are being taken."""
    return sum(path.stat().st_size for path in folder.glob("runs/*/log.jsonl"))


def kill_at_random(process: subprocess.Popen[bytes], folder: Path, chance: random.Random) -> str:
    """Kill the whole group, in turn while it starts and while it trains; return what it was doing."""
    if chance.random() < 0.3:
        time.sleep(chance.uniform(1, 4))
    else:
        before, end = written(folder), time.monotonic() + LIMIT
        while process.poll() is None and written(folder) <= before and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.0))
    if process.poll() is not None:
        return "over"
    kill(process)
    return "training" if list(folder.glob("runs/*/checkpoint.json")) else "starting"


def table(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Everything about every run but what is measured."""
    rows = {record.id: asdict(record) for record in collect(folder).records}
    return {id: {name: value for name, value in row.items() if name not in MEASURED} for id, row in rows.items()}


def test_ten_kills_change_nothing(write: Callable, models: Path, tmp_path: Path) -> None:
    plan = write(seeds="0, 1, 2, 3", more=MORE)
    finish(command(plan, tmp_path / "calm", models, workers=2))
    chance = random.Random(os.environ.get("DELTATUNE_KILL_SEED", "2"))
    killed: list[str] = []
    while len(killed) < KILLS:
        process = command(plan, tmp_path / "killed", models, workers=1)
        killed.append(kill_at_random(process, tmp_path / "killed", chance))
        if killed[-1] == "over":
            break
    finish(command(plan, tmp_path / "killed", models, workers=1))
    calm = table(tmp_path / "calm")
    assert len(calm) == 4 + 16
    assert killed.count("training") >= 3, f"the kills came too late to disturb anything: {killed}"
    assert table(tmp_path / "killed") == calm
    kept = {path.name for path in (tmp_path / "killed").glob("runs/*/*")}
    assert kept == {path.name for path in (tmp_path / "calm").glob("runs/*/*")}
    if "over" in killed:
        pytest.skip(f"the study ended before the tenth kill: {killed}")
