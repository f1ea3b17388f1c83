"""The benchmarks run from end to end, in a real process, and write what their documentation says. No time is judged."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[1]
COMMON = {"benchmark", "quick", "rounds", "machine", "shape"}
MACHINE = {"cpu", "cores", "threads", "git", "load", "deltatune", "torch", "transformers", "peft"}
Run = Callable[[str], tuple[dict[str, Any], str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run one benchmark quickly; returns its JSON and its Markdown."""

    def run(name: str) -> tuple[dict[str, Any], str]:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / f"{name}.json").read_text()), (tmp_path / f"{name}.md").read_text()

    return run


def sound(spread: dict[str, float]) -> bool:
    return set(spread) == {"median", "low", "high"} and all(math.isfinite(v) and v > 0 for v in spread.values())


def test_attach(run: Run) -> None:
    result, text = run("attach")
    assert set(result) == COMMON | {"verbs", "calls"}
    assert set(result["machine"]) >= MACHINE
    assert len(result["verbs"]) == 8
    for row in result["verbs"]:
        assert set(row) == {"what", "unit", "deltatune", "peft", "ratio"}
        assert row["deltatune"] > 0 and row["peft"] > 0 and sound(row["ratio"])
        assert f"| {row['what']} |" in text
    assert [row["what"] for row in result["calls"]] == [
        "LoRA by hand",
        "deltatune, nothing",
        "deltatune LoRA",
        "peft LoRA",
    ]
    for row in result["calls"]:
        assert set(row) == {"what", "microseconds", "extra", "floor", "ratio"}
        assert row["microseconds"] > 0 and sound(row["ratio"])


def test_step(run: Run) -> None:
    result, text = run("step")
    assert set(result) == COMMON | {"rows", "pairs"}
    rows = {row["what"]: row for row in result["rows"]}
    for row in rows.values():
        assert set(row) == {"what", "delta", "parameters", "milliseconds", "ratio", "saved_bytes", "saved_ratio"}
        assert row["milliseconds"] > 0 and sound(row["ratio"]) and row["saved_bytes"] > 0
        assert f"| {row['what']} |" in text
    assert len(rows) == 9 and rows["frozen-backbone limit"]["parameters"] == 0
    assert [(pair["what"], pair["over"], sound(pair["ratio"])) for pair in result["pairs"]] == [
        ("deltatune LoRA", "peft LoRA", True),
        ("deltatune Full", "plain full fine-tuning", True),
    ]
    for pair in result["pairs"]:  # they do the same, so they train as much, and deltatune keeps no more for it
        ours, theirs = rows[pair["what"]], rows[pair["over"]]
        assert ours["parameters"] == theirs["parameters"] and ours["saved_bytes"] <= theirs["saved_bytes"]


def test_route(run: Run) -> None:
    result, text = run("route")
    assert set(result) == COMMON | {"batches", "members"}
    assert len(result["batches"]) == 12
    for row in result["batches"]:
        assert set(row) == {"what", "tokens", "milliseconds", "over_bare", "over_single"}
        assert row["milliseconds"] > 0 and sound(row["over_bare"]) and sound(row["over_single"])
        assert f"| {row['what']}, {row['tokens']} token" in text
    assert [row["what"] for row in result["members"]] == ["add", "load from disk", "enter a route to it", "remove"]
    assert all(row["first"] > 0 and row["last"] > 0 and sound(row["ratio"]) for row in result["members"])
