"""The benchmarks run from end to end, in a real process, and write what their documentation says. No time is judged."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[1]
COMMON = {"quick", "device", "rounds", "machine", "shape"}
MACHINE = {"cpu", "cores", "threads", "git", "load", "deltatune", "torch", "transformers", "peft"}
NAMES = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if re.search(r"^BENCHMARK = ", path.read_text(), re.M)
)
Run = Callable[[str], dict[str, Any]]


def command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run one benchmark quickly, once, and return its result."""

    @cache
    def run(name: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp(name)
        done = command("benchmarks", name, "--quick", "--out", str(out))
        assert done.returncode == 0, done.stderr
        assert {path.name for path in out.iterdir()} == {"cpu.json", "cpu.html"}
        found = json.loads((out / "cpu.json").read_text())["benchmarks"]
        assert list(found) == [name]
        return found[name]

    return run


def sound(spread: dict[str, float]) -> bool:
    return set(spread) == {"median", "low", "high"} and all(math.isfinite(v) and v > 0 for v in spread.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_runs_and_shows_what_it_measured(run: Run, name: str) -> None:
    from benchmarks.benchmark import find
    from benchmarks.plots import look_of
    from benchmarks.results import statement
    from deltatune.study.figures import svg
    from deltatune.study.palette import SCREEN

    benchmark, result = find(name), run(name)
    assert benchmark is not None and benchmark.name == name
    assert set(result) > COMMON and set(result["machine"]) >= MACHINE
    assert result["quick"] and result["device"] == "cpu" and "A trial with tiny shapes" in statement(result)
    assert benchmark.title and benchmark.about
    for table in benchmark.tables(result):
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
        assert f"| {table.rows[0][0]} |" in table.markdown()
    figures = benchmark.plots(result)
    for index, each in enumerate(figures):
        assert svg(each.panel(), look_of(figures, SCREEN), str(index)).startswith("<svg ")


def test_attach(run: Run) -> None:
    result = run("attach")
    assert set(result) == COMMON | {"verbs", "calls"}
    assert len(result["verbs"]) == 8
    for row in result["verbs"]:
        assert set(row) == {"what", "unit", "deltatune", "peft", "ratio"}
        assert row["deltatune"] > 0 and row["peft"] > 0 and sound(row["ratio"])
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
    result = run("step")
    rows = {(row["library"], row["method"]): row for row in result["rows"]}
    for row in rows.values():
        assert row["milliseconds"] > 0 and sound(row["ratio"]) and row["saved_bytes"] > 0 and row["peak_bytes"] is None
        assert len(row["seconds"]) == result["rounds"]
    assert rows["", "frozen-backbone limit"]["parameters"] == 0
    assert rows["", "frozen-backbone limit"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    found = {(pair["method"], pair["over"]) for pair in result["pairs"]}
    peft = {"LoRA", "DoRA", "IA3", "PrefixTuning", "PromptTuning"}
    assert found >= {*((method, "peft") for method in peft), ("BitFit", "plain"), ("Full", "plain")}
    for pair in result["pairs"]:  # they do the same, so they train as much
        assert sound(pair["ratio"])
        ours, theirs = rows["deltatune", pair["method"]], rows[pair["over"], pair["method"]]
        assert ours["parameters"] == theirs["parameters"]


def test_route(run: Run) -> None:
    result = run("route")
    assert set(result) == COMMON | {"batches", "members"}
    assert len(result["batches"]) == 12
    for row in result["batches"]:
        assert set(row) == {"what", "tokens", "milliseconds", "over_bare", "over_single"}
        assert row["milliseconds"] > 0 and sound(row["over_bare"]) and sound(row["over_single"])
    assert [row["what"] for row in result["members"]] == ["add", "load from disk", "enter a route to it", "remove"]
    assert all(row["first"] > 0 and row["last"] > 0 and sound(row["ratio"]) for row in result["members"])
