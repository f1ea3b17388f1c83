"""What a compiler makes of a training step, for deltatune and for peft.

The step is that of `step`: a Llama's loss forward and backward, without an optimizer, on a GPU at the shape of a model of a billion
parameters in bf16. `tune` is the step of deltatune's own loop, with `compiler = "inductor"` where it is compiled; peft's model is
given to `torch.compile` as a whole. All take turns in one process; told in units of the frozen-backbone limit, which is not compiled.
`first` is what the first step takes, in which the code is written and built, unless torch's cache on disk holds it from an earlier run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.benchmark import Benchmark, Result, Table
from benchmarks.measure import Clock, ratios, show
from benchmarks.plots import LIMIT, Bars, Plot
from benchmarks.step import BENCHMARK as STEPS
from benchmarks.step import Shape as Step
from benchmarks.training import STEP, Contestant, limit
from benchmarks.twins import deltas, peft_configs, with_peft, with_tune


@dataclass(frozen=True, kw_only=True)
class Shape(Step):
    """A model, a batch, the methods and the compiler."""

    methods: tuple[str, ...] = ("LoRA", "DoRA", "IA3")
    compiler: str = "inductor"


@dataclass(frozen=True)
class Entry:
    """One way to train, and whose it is."""

    library: str
    method: str
    compiler: str
    way: Contestant

    @property
    def label(self) -> str:
        """What it is called in tables."""
        how = "" if self.compiler == "none" else "compiled"
        return " ".join(filter(None, (self.library, self.method, how)))


def entries(shape: Shape) -> list[Entry]:
    """Build the limit and every method in both libraries, compiled and not."""
    ids = shape.ids(shape.rows, shape.tokens)
    ours, theirs = deltas(shape.width), peft_configs()
    found = [Entry("", LIMIT, "none", limit(shape.model(), ids))]
    for method in shape.methods:
        for compiler in ("none", shape.compiler):
            found.append(Entry("tune", method, compiler, with_tune(shape.model(), ids, ours[method], compiler)))
            found.append(Entry("peft", method, compiler, with_peft(shape.model(), ids, theirs[method], compiler)))
    return found


def measure(shape: Shape) -> Result:
    """Take the first step of each, then all in turns."""
    torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]  # all live in one process
    ways = entries(shape)
    first = {one.label: _seconds(one.way) for one in ways}
    took = shape.turns({one.label: one.way.turn for one in ways})
    bare = took[LIMIT].seconds[STEP]
    return {"rows": [_row(one, first[one.label], took[one.label].seconds[STEP], bare, shape.device) for one in ways]}


def _seconds(way: Contestant) -> float:
    started = perf_counter()
    way.turn(Clock())
    return perf_counter() - started


def _row(one: Entry, first: float, seconds: list[float], bare: list[float], device: str) -> dict[str, Any]:
    return {
        "label": one.label,
        "library": one.library,
        "first_seconds": first,
        "milliseconds": 1e3 * median(seconds),
        "ratio": ratios(seconds, bare).to_json(),
        "peak_bytes": one.way.peak_bytes(device),
    }


def tables(result: Result) -> list[Table]:
    """Return every contestant."""
    gpu = result["device"] != "cpu"
    rows = [
        (
            row["label"],
            f"{row['first_seconds']:.1f} s",
            f"{row['milliseconds']:.0f} ms",
            show(row["ratio"]),
            *([f"{row['peak_bytes'] / 2**20:.1f} MiB"] if gpu else []),
        )
        for row in result["rows"]
    ]
    size = "{layers} layers, d={width}, ffn={ffn}, batch {rows} x {tokens}, {dtype}".format(**result["shape"])
    return [
        Table(
            f"Compiled steps of a Llama ({size})",
            ("", "first", "step", "step / limit", *(["peak"] if gpu else [])),
            rows,
        )
    ]


def plots(result: Result) -> list[Plot]:
    """Return time over the limit."""
    rows = result["rows"]
    of = {row["label"]: row["library"] or LIMIT for row in rows}
    return [Bars("Step / limit", {row["label"]: row["ratio"]["median"] for row in rows}, of=of)]


BENCHMARK = Benchmark(
    full=Shape(**asdict(STEPS.full)),
    quick=Shape(**asdict(STEPS.quick), methods=("LoRA",), compiler="aot_eager"),
    measure=measure,
    tables=tables,
    plots=plots,
    gpu=Shape(**asdict(STEPS.gpu)),
)
