"""The benchmarks run from end to end, in a real process, and write what their documentation says. No time is judged."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
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
    assert bool(result["adapters"]) == (ROOT / ".venv-adapters/bin/python").exists()
    peft = {"LoRA", "DoRA", "IA3", "PrefixTuning", "PromptTuning"}
    assert found >= {*((method, "peft") for method in peft), ("BitFit", "plain"), ("Full", "plain")}
    for pair in result["pairs"]:  # they do the same, so they train as much
        assert sound(pair["ratio"])
        ours, theirs = rows["deltatune", pair["method"]], rows[pair["over"], pair["method"]]
        assert ours["parameters"] == theirs["parameters"]
        assert pair["saved_ratio"] <= 1 or pair["over"] == "adapters"  # which has another version of the backbone


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


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "attach": check_attach,
    "growth": check_growth,
    "imports": check_imports,
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


def test_the_library_adapters_is_left_out_where_it_is_not_set_up(tmp_path: Path) -> None:
    from benchmarks.step import BENCHMARK, rows_of_adapters

    assert rows_of_adapters(BENCHMARK.quick, tmp_path / "python") == (None, [])


def test_what_is_measured_apart_is_compared_with_the_widest_range() -> None:
    from benchmarks.step import LIMIT, Measured, pairs

    bare, ours = Measured(0, [1.0, 1.0], 100, None), Measured(5, [2.0, 4.0], 150, None)
    other_bare, theirs = Measured(0, [2.0, 2.0], 200, None), Measured(5, [8.0, 8.0], 400, None)
    rows = [bare.row("", LIMIT, None, bare), ours.row("deltatune", "A", "A()", bare), ours.row("peft", "A", None, bare)]
    apart, together = reversed(pairs([*rows, theirs.row("adapters", "A", None, other_bare)]))
    assert together["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0} and together["saved_ratio"] == 1.0
    assert apart["ratio"] == {"median": 3 / 4, "low": 2.5 / 4, "high": 3.5 / 4} and apart["saved_ratio"] == 1.5 / 2


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.measure import Clock, take_turns

    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 3000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("settle"))

    def turn(clock: Clock) -> None:
        with clock("work", calls=2):
            calls.append("work")

    took = take_turns({"only": turn}, rounds=2, device="cuda", warmup=1)
    assert took["only"].seconds == {"work": [1.5, 1.5]}
    assert calls == ["settle", "record", "work", "record", "wait"] * 3


def test_the_device_reaches_models_batches_and_clocks() -> None:
    import torch

    from benchmarks.measure import Clock
    from benchmarks.step import BENCHMARK

    on_gpu = BENCHMARK.shape(quick=False, device="cuda")
    assert on_gpu.device == "cuda" and on_gpu.width == 2048 and BENCHMARK.shape(False, "cpu").width == 768
    assert BENCHMARK.shape(quick=True, device="cuda") == replace(BENCHMARK.quick, device="cuda")
    shape = replace(BENCHMARK.quick, device="meta", dtype="bfloat16")
    held = list(shape.model().parameters())
    assert {(p.device.type, p.dtype) for p in held} == {("meta", torch.bfloat16)} and shape.ids(2, 3).is_meta
    seen: list[str] = []

    def turn(clock: Clock) -> None:
        seen.append(clock.device)
        clock.add("work", 1.0)

    shape.turns({"only": turn})
    assert seen == ["meta"] * 3


def test_what_is_saved_is_what_the_graph_holds_each_storage_once() -> None:
    import torch

    from benchmarks.training import training

    model, x = torch.nn.Linear(4, 3), torch.ones(2, 4)

    def loss(input_ids: Any, labels: Any) -> Loss:
        (model(x) ** 2).sum()  # a graph that is gone at the end
        return Loss((model(x) ** 2).sum() + (model(x) * 2).sum())

    way = training(loss, x, model.parameters())
    way = replace(way, model=model)
    assert way.saved_bytes() == x.nbytes + 4 * 2 * 3  # the input of both calls, and the output that is squared
    assert way.saved_bytes() == way.saved_bytes() and model.weight.grad is None


def test_the_peak_of_a_step_is_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.training import training

    model = torch.nn.Linear(2, 2)
    way = training(lambda input_ids, labels: Loss(model(input_ids).sum()), torch.ones(1, 2), model.parameters())
    assert way.peak_bytes("cpu") is None
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 164)
    assert way.peak_bytes("cuda") == 64 and model.weight.grad is None


class Loss:
    def __init__(self, loss: Any) -> None:
        self.loss = loss


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


def test_a_result_takes_the_place_of_the_earlier_one_alone(tmp_path: Path) -> None:
    from benchmarks.store import keep, read

    path = tmp_path / "cpu.json"
    keep(path, "step", {"rounds": 1})
    keep(path, "attach", {"rounds": 2})
    keep(path, "step", {"rounds": 3})
    assert list(read(path).items()) == [("attach", {"rounds": 2}), ("step", {"rounds": 3})]


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
