"""What a training step costs, against the frozen-backbone limit and against other libraries.

A step is the forward and backward pass of the language modelling loss of a Llama, without an optimizer: on a CPU of four
layers, one thread and fp32, on a GPU of the shape of a model of a billion parameters in bf16. The limit
trains nothing: the same frozen model, whose loss is differentiated with respect to the output of the embeddings alone. No
method whose delta begins in the first block can do with much less.

`saved` is what autograd keeps for the backward pass, each storage counted once and parameters not counted. It depends on
the code and the shapes alone, so it is the same on every machine.

`deltatune` is a delta that was attached to the model as it is, for a loop of one's own; `tune` is the step of deltatune's own
loop, which computes norms, gated layers and loss in ways of its own too, and has products in fp32 from oneDNN where that is exact.

Each method is told beside the same method elsewhere: LoRA, DoRA, (IA)^3, prefix and prompt tuning of peft; the adapters of
Houlsby and of Pfeiffer and prefix tuning of the library `adapters`; biases and all parameters trained by a plain loop. All
take turns in one process, but for `adapters`, which needs other versions: it is measured in `.venv-others`, where that is
set up (`make .venv-others/.ready`), in turns with a limit of its own, so its times are those in units of that limit, and
a ratio to it is a quotient of two ratios, with the widest range that their quartiles allow.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.benchmark import Benchmark, Result, Table
from benchmarks.measure import ratios, show
from benchmarks.plots import LIMIT, Bars, Plot
from benchmarks.shape import LlamaShape
from benchmarks.training import STEP, Contestant, limit
from benchmarks.twins import PLAIN, deltas, peft_configs, with_delta, with_peft, with_tune

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ROOT / ".venv-others" / "bin" / "python"
OURS, TUNE, APART = "deltatune", "tune", "adapters"


@dataclass(frozen=True, kw_only=True)
class Shape(LlamaShape):
    """A model and a batch."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Measured:
    """What was measured of one contestant, here or in another process."""

    parameters: int
    seconds: list[float]
    saved_bytes: int
    peak_bytes: int | None

    def row(self, library: str, method: str, delta: str | None, bare: Measured) -> dict[str, Any]:
        """Return its row of the result, in units of the limit that was measured beside it."""
        return {
            "library": library,
            "method": method,
            "delta": delta,
            **asdict(self),
            "milliseconds": 1e3 * median(self.seconds),
            "ratio": ratios(self.seconds, bare.seconds).to_json(),
            "saved_ratio": self.saved_bytes / bare.saved_bytes,
        }


def contestants(shape: Shape) -> dict[tuple[str, str], Contestant]:
    """Build every contestant of this process on its own copy of the model, by library and method."""
    ids = shape.ids(shape.rows, shape.tokens)
    ours = {
        (who, name): build(shape.model(), ids, delta)
        for who, build in ((OURS, with_delta), (TUNE, with_tune))
        for name, delta in deltas(shape.width).items()
    }
    peft = {("peft", name): with_peft(shape.model(), ids, config) for name, config in peft_configs().items()}
    plain = {("plain", name): build(shape, ids) for name, build in PLAIN.items()}
    return {("", LIMIT): limit(shape.model(), ids), **ours, **peft, **plain}


def rows_here(shape: Shape) -> list[dict[str, Any]]:
    """Measure every contestant of this process."""
    ways = contestants(shape)
    saved = {key: (way.saved_bytes(), way.peak_bytes(shape.device)) for key, way in ways.items()}
    took = shape.turns({" ".join(key): way.turn for key, way in ways.items()})
    found = {key: Measured(way.parameters, took[" ".join(key)].seconds[STEP], *saved[key]) for key, way in ways.items()}
    bare = found["", LIMIT]
    return [one.row(*key, ways[key].delta, bare) for key, one in found.items()]


def rows_of_adapters(shape: Shape, python: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """Measure the library `adapters` in its own environment: its version and its rows, or nothing where it is not set up."""
    if not python.exists():
        return None, []
    command = [str(python), "-m", "benchmarks.peers.adapterhub", json.dumps(asdict(shape))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    bare = Measured(**found["limit"])
    return found["version"], [Measured(**own).row(APART, name, None, bare) for name, own in found["rows"].items()]


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare both ways of deltatune with every other way to do the same method."""
    ours = [row for row in rows if row["library"] in (OURS, TUNE)]
    others = [row for row in rows if row["library"] not in (OURS, TUNE, "")]
    return [_pair(own, other) for other in others for own in ours if own["method"] == other["method"]]


def _pair(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    apart = other["library"] == APART
    return {
        "library": own["library"],
        "method": own["method"],
        "over": other["library"],
        "ratio": _quotient(own["ratio"], other["ratio"]) if apart else _turn_by_turn(own, other),
        "saved_ratio": own["saved_ratio"] / other["saved_ratio"],
    }


def _turn_by_turn(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    return ratios(own["seconds"], other["seconds"]).to_json()


def _quotient(above: dict[str, float], below: dict[str, float]) -> dict[str, float]:
    """Return the quotient of spreads that were measured apart, with the widest range that they allow."""
    ends = {"median": "median", "low": "high", "high": "low"}
    return {end: above[end] / below[other] for end, other in ends.items()}


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows method by method, the limit first and deltatune before the others."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return sorted(rows, key=lambda row: (methods.index(row["method"]), row["library"] not in (OURS, TUNE)))


def measure(shape: Shape) -> Result:
    """Measure all libraries."""
    version, others = rows_of_adapters(shape, OTHERS)
    rows = in_order([*rows_here(shape), *others])
    return {"adapters": version, "rows": rows, "pairs": pairs(rows)}


def tables(result: Result) -> list[Table]:
    """Return every contestant, and every pair."""
    gpu = result["device"] != "cpu"
    rows = [
        (
            _label(r),
            f"{r['parameters']:,}",
            f"{r['milliseconds']:.0f} ms",
            show(r["ratio"]),
            f"{r['saved_bytes'] / 2**20:.1f} MiB",
            f"{r['saved_ratio']:.2f}",
            *([f"{r['peak_bytes'] / 2**20:.1f} MiB"] if gpu else []),
        )
        for r in result["rows"]
    ]
    size = "{layers} layers, d={width}, ffn={ffn}, batch {rows} x {tokens}, {dtype}".format(**result["shape"])
    columns = ("", "trained", "step", "step / limit", "saved", "saved / limit", *(["peak"] if gpu else []))
    versus = [(f"{_label(r)} / {r['over']}", show(r["ratio"]), f"{r['saved_ratio']:.2f}") for r in result["pairs"]]
    return [
        Table(f"Training step of a Llama ({size})", columns, rows),
        Table("deltatune / the same method elsewhere", ("", "step", "saved"), versus),
    ]


def _label(row: dict[str, Any]) -> str:
    return f"{row['library']} {row['method']}".strip()


def plots(result: Result) -> list[Plot]:
    """Return time and memory over the limit."""
    rows = result["rows"]
    of = {_label(r): r["library"] or LIMIT for r in rows}
    return [
        Bars("Step / limit", {_label(r): r["ratio"]["median"] for r in rows}, of=of),
        Bars("Saved for backward / limit", {_label(r): r["saved_ratio"] for r in rows}, of=of),
    ]


BENCHMARK = Benchmark(
    full=Shape(layers=4, width=768, ffn=2048, heads=12, rows=4, tokens=128, rounds=11),
    quick=Shape(layers=1, width=64, ffn=96, heads=2, rows=2, tokens=8, rounds=2),
    measure=measure,
    tables=tables,
    plots=plots,
    gpu=Shape(
        layers=16, width=2048, ffn=8192, heads=32, vocabulary=32000, dtype="bfloat16", rows=4, tokens=512, rounds=15
    ),
)
