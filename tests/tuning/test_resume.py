"""A training killed at any moment and started again gives the log and the weights of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltatune.errors import DeltaTuneError
from deltatune.tuning.checkpoint import POINTER, read_checkpoint
from tests.tuning import training


def start(folder: Path, changes: dict[str, Any] | None = None, die_at: int = 0) -> Any:
    folder.mkdir(exist_ok=True)
    process = training.PROCESSES.Process(target=training.train, args=(str(folder), changes, die_at))
    process.start()
    return process


def finish(folder: Path, changes: dict[str, Any] | None = None) -> None:
    process = start(folder, changes)
    process.join(120)
    assert process.exitcode == 0


def log(folder: Path) -> list[dict[str, Any]]:
    """The log without what differs between any two trainings: seconds and memory."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in lines]


def same(one: Path, other: Path) -> None:
    assert log(one) == log(other)
    weights, others = load_file(one / "final.safetensors"), load_file(other / "final.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder)
    steps = [line["step"] for line in log(folder) if "loss" in line]
    assert steps == list(range(1, 25))
    assert [line["step"] for line in log(folder) if "dev" in line] == [5, 10, 15, 20, 24]
    return folder


def test_killed_at_random_moments(undisturbed: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    folder = tmp_path / "run"
    for _ in range(10):
        process = start(folder)
        wait_for_steps(folder, process, moments.randint(1, 7))
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
    assert "loss" in (folder / "log.jsonl").read_text()
    finish(folder)
    same(undisturbed, folder)


def wait_for_steps(folder: Path, process: Any, count: int) -> None:
    """Wait until the process has written `count` more lines to the log, or is done."""
    path = folder / "log.jsonl"
    seen, last = 0, path.stat().st_size if path.exists() else 0
    while seen < count and process.is_alive():
        now = path.stat().st_size if path.exists() else 0
        seen, last = seen + (now > last), now
        time.sleep(0.0005)


def test_killed_at_every_change_of_a_file(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for die_at in range(1, 80):
        process = start(folder, die_at=die_at)
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert die_at > 8
    same(undisturbed, folder)
    left = {path.name for path in folder.iterdir()}
    assert left == {"log.jsonl", "final.safetensors", POINTER, "checkpoint-000024.safetensors", *_best(folder)}


def test_a_finished_training_is_not_trained_again(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(folder)
    before = (folder / "log.jsonl").read_bytes()
    finish(folder)
    assert (folder / "log.jsonl").read_bytes() == before
    same(undisturbed, folder)


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_every_optimizer_continues_exactly(optimizer: str, tmp_path: Path) -> None:
    changes = {"optimizer": optimizer, "lr": 1e-3, "steps": 10}
    finish(tmp_path / "whole", changes)
    for die_at in (14, 25):
        start(tmp_path / "cut", changes, die_at).join(120)
    assert read_checkpoint(tmp_path / "cut") is not None
    finish(tmp_path / "cut", changes)
    same(tmp_path / "whole", tmp_path / "cut")


def test_a_damaged_checkpoint_is_named_and_not_trained_over(tmp_path: Path) -> None:
    training.make(tmp_path).run()
    state = tmp_path / read_checkpoint(tmp_path)[0]["state"]
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(
        DeltaTuneError, match=r"checkpoint-000024.safetensors is missing or not a whole .* delete .*json"
    ):
        training.make(tmp_path)


def _best(folder: Path) -> list[str]:
    return [read_checkpoint(folder)[0]["best"]]
