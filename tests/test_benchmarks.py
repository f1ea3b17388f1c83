"""The benchmarks run from end to end, in a real process, and write what their documentation says. No time is judged."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
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


def command(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def sound(spread: dict[str, float]) -> bool:
    return set(spread) == {"median", "low", "high"} and all(math.isfinite(v) and v > 0 for v in spread.values())


def check_attach(result: dict[str, Any]) -> None:
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


def check_step(result: dict[str, Any]) -> None:
    rows = {(row["library"], row["method"]): row for row in result["rows"]}
    for row in rows.values():
        assert row["milliseconds"] > 0 and sound(row["ratio"]) and row["saved_bytes"] > 0 and row["peak_bytes"] is None
        assert len(row["seconds"]) == result["rounds"]
    assert rows["", "frozen-backbone limit"]["parameters"] == 0
    assert rows["", "frozen-backbone limit"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    found = {(pair["method"], pair["over"]) for pair in result["pairs"]}
    apart = {method for method, over in found if over == "adapters"}
    assert apart == ({"Houlsby", "Pfeiffer", "PrefixTuning"} if result["adapters"] else set())
    assert bool(result["adapters"]) == (ROOT / ".venv-others/bin/python").exists()
    peft = {"LoRA", "DoRA", "IA3", "PrefixTuning", "PromptTuning"}
    assert found >= {*((method, "peft") for method in peft), ("BitFit", "plain"), ("Full", "plain")}
    for pair in result["pairs"]:  # they do the same, so they train as much
        assert sound(pair["ratio"])
        ours, theirs = rows["deltatune", pair["method"]], rows[pair["over"], pair["method"]]
        assert ours["parameters"] == theirs["parameters"]
        assert pair["saved_ratio"] <= 1 or pair["over"] == "adapters"  # which has another version of the backbone


def check_compiled(result: dict[str, Any]) -> None:
    rows = {row["label"]: row for row in result["rows"]}
    assert list(rows) == [
        "frozen-backbone limit",
        *(f"{who} LoRA{how}" for how in ("", " compiled") for who in ("tune", "peft")),
    ]
    assert all(row["first_seconds"] > 0 and sound(row["ratio"]) for row in rows.values())
    assert rows["tune LoRA compiled"]["first_seconds"] > rows["tune LoRA"]["first_seconds"], "the first step compiles"


def check_end_to_end(result: dict[str, Any]) -> None:
    assert set(result) == COMMON | {"rows", "pairs"}
    assert len(result["rows"]) == 3 * result["rounds"]
    for row in result["rows"]:
        assert set(row) == {"model", "task", "who", "seed", "seconds", "wall", "bytes", "loss"}
        assert row["seconds"] > 0 and row["wall"] > 0 and row["bytes"] > 1 << 20 and math.isfinite(row["loss"])
    own = {row["loss"] for row in result["rows"] if row["who"] == "deltatune"}
    assert len(own) == result["rounds"], "each seed is a training of its own"
    assert [pair["over"] for pair in result["pairs"]] == ["Trainer + peft", "the same, tuned"]
    for pair in result["pairs"]:  # after two steps from the same backbone
        assert abs(pair["loss_difference"]) < 0.05 * pair["loss"] and pair["loss_spread"] > 0
        assert min(pair["seconds_ratio"], pair["wall_ratio"], pair["bytes_ratio"]) > 0


def check_route(result: dict[str, Any]) -> None:
    assert set(result) == COMMON | {"batches", "members"}
    assert len(result["batches"]) == 12
    for row in result["batches"]:
        assert set(row) == {"what", "tokens", "milliseconds", "over_bare", "over_single"}
        assert row["milliseconds"] > 0 and sound(row["over_bare"]) and sound(row["over_single"])
    assert [row["what"] for row in result["members"]] == ["add", "load from disk", "enter a route to it", "remove"]
    assert all(row["first"] > 0 and row["last"] > 0 and sound(row["ratio"]) for row in result["members"])


def check_growth(result: dict[str, Any]) -> None:
    for axis, values in result["shape"]["along"].items():
        points = result["steps"][axis]
        assert [p["at"] for p in points] == values
        for p in points:
            assert p["deltatune"]["parameters"] == p["peft"]["parameters"] > 0
            assert all(sound(p[name]["ratio"]) and p[name]["saved_ratio"] > 0 for name in ("deltatune", "peft"))
    assert [p["sites"] for p in result["attach"]] == [7 * blocks for blocks in result["shape"]["attached"]]
    trained = {axis: [p["deltatune"]["parameters"] for p in points] for axis, points in result["steps"].items()}
    assert all(trained[axis][1] == 2 * trained[axis][0] for axis in ("layers", "rank", "adapted"))
    assert all(trained[axis][1] == trained[axis][0] for axis in ("rows", "tokens"))


def check_imports(result: dict[str, Any]) -> None:
    rows = {row["what"]: row for row in result["starts"]}
    assert set(rows) == {"python", "deltatune --help"}
    assert all(row["seconds"] > 0 and row["floor"] in rows for row in rows.values())


def check_ledger(result: dict[str, Any]) -> None:
    (row,) = result["trials"]
    assert (row["backbone"], row["method"]) == ("tiny Llama", "LoRA")
    assert 0 < row["planned"] == row["ledger"]["growth"] and row["growth"] > 0 and min(row["usual"]) > 0
    assert abs(row["error_of_peak"]) < 0.1 and row["planned_seconds"] > 0 and row["seconds"] > 0


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "attach": check_attach,
    "compiled": check_compiled,
    "growth": check_growth,
    "imports": check_imports,
    "end_to_end": check_end_to_end,
    "ledger": check_ledger,
    "route": check_route,
    "step": check_step,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_runs_and_shows_what_it_measured(tmp_path: Path, name: str) -> None:
    from benchmarks.benchmark import find
    from benchmarks.plots import look_of
    from benchmarks.store import statement
    from deltatune.study.figures import svg
    from deltatune.study.palette import SCREEN

    done = command("benchmarks", name, "--quick", "--here", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cpu.json").read_text())["benchmarks"]
    benchmark, result = find(name), found[name]
    assert benchmark is not None and benchmark.name == name and list(found) == [name]
    assert set(result) > COMMON and set(result["machine"]) >= MACHINE
    assert result["quick"] and result["device"] == "cpu" and "A trial with tiny shapes" in statement(result)
    assert benchmark.title and benchmark.about
    for table in benchmark.tables(result):
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
        assert f"| {table.rows[0][0]} |" in table.markdown() and table.rows[0][0] in done.stdout
    figures = benchmark.plots(result)
    for index, each in enumerate(figures):
        assert svg(each.panel(), look_of(figures, SCREEN), str(index)).startswith("<svg ")
    if name in CHECKS:
        CHECKS[name](result)


def test_everything_that_is_imported_can_be() -> None:
    from benchmarks.imports import STARTS

    for arguments, floor in STARTS.values():
        assert floor in STARTS
        if arguments[0] == "-c":
            exec(arguments[1], {})


def test_an_unknown_benchmark_is_named_with_those_there_are(tmp_path: Path) -> None:
    done = command("benchmarks", "stride", "--quick", "--out", str(tmp_path))
    assert done.returncode != 0 and "there is no benchmark 'stride'" in done.stderr
    assert ", ".join(NAMES) in done.stderr and not list(tmp_path.iterdir())


def test_one_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import __main__ as command

    started: list[str] = []

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        assert arguments[:3] == [sys.executable, "-m", "benchmarks"]
        assert arguments[4:] == ["--here", "--device", "cuda", "--out", str(tmp_path), "--quick"]
        started.append(arguments[3])
        return subprocess.CompletedProcess(arguments, int(arguments[3] == "attach"))

    argv = ["benchmarks", "--quick", "--device", "cuda", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU"):
        command.main()
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.subprocess, "run", run)
    with pytest.raises(SystemExit, match="these benchmarks failed: attach"):
        command.main()
    assert started == NAMES


def without_figures(page: str) -> str:
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_the_document_and_the_page_say_what_the_results_say(tmp_path: Path) -> None:
    from benchmarks.benchmark import RESULTS, all_benchmarks
    from benchmarks.page import DOCS, document, html
    from benchmarks.store import files, read

    assert sorted(all_benchmarks()) == NAMES
    copy = tmp_path / "performance.md"
    copy.write_text(DOCS.read_text(encoding="utf-8"), encoding="utf-8")
    document(copy, RESULTS)
    assert copy.read_text() == DOCS.read_text(), (
        "docs/performance.md is older than the results: python -m benchmarks.page"
    )
    for path in files(RESULTS):
        page, written = html(path), path.with_suffix(".html").read_text(encoding="utf-8")
        assert without_figures(page) == without_figures(written), "the page is older: python -m benchmarks.page"
        assert not re.findall(r"(?:src|href)=\"(?!#)|@import|url\((?!#)", page)
        for name in read(path):
            assert f'<h2 id="{name}">' in page and f'id="{name}-0-' in page
