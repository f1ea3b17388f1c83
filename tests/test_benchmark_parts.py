"""What benchmarks are made of: clocks, shapes, what a step keeps, comparisons and files of results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")


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


def test_a_result_takes_the_place_of_the_earlier_one_alone(tmp_path: Path) -> None:
    from benchmarks.store import keep, read

    path = tmp_path / "cpu.json"
    keep(path, "step", {"rounds": 1})
    keep(path, "attach", {"rounds": 2})
    keep(path, "step", {"rounds": 3})
    assert list(read(path).items()) == [("attach", {"rounds": 2}), ("step", {"rounds": 3})]
