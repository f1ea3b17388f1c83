"""How the cost of LoRA grows: with depth, width, rank, batch, length and the number of sites.

One size of a small Llama is changed at a time, the others stay. At each point LoRA on every linear takes training steps,
with deltatune and with peft, in turns with the frozen-backbone limit of the very same size; what is drawn are ratios to that
limit, so a flat line means that the cost of LoRA grows as the backbone's own does. `saved` is what autograd keeps for the
backward pass.

Sites are the linears of the first blocks. Attaching is measured on models with as many blocks as the number of sites needs,
and drawn in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.attach import attach_and_detach, wrap_and_unload
from benchmarks.benchmark import Benchmark, Result, Table
from benchmarks.measure import Spread, ratios, show
from benchmarks.plots import LIMIT, Curves, Plot, same
from benchmarks.shape import LlamaShape
from benchmarks.training import STEP, limit
from benchmarks.twins import lora, peft_lora, with_delta, with_peft

LINEARS = 7  # of a block
OURS, PEFT = "deltatune", "peft"
AXES = {
    "layers": "depth, blocks",
    "width": "width",
    "rank": "rank",
    "rows": "batch, rows",
    "tokens": "length, tokens",
    "adapted": "adapted blocks",
}


@dataclass(frozen=True, kw_only=True)
class Shape(LlamaShape):
    """The point from which one size at a time is changed, `along` which values, and how many blocks are attached to."""

    rows: int
    tokens: int
    rank: int
    adapted: int
    along: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attached: tuple[int, ...] = ()

    def at(self, axis: str, value: int) -> Shape:
        """Return the shape with one size changed; what depends on it follows."""
        follows: dict[str, int] = {}
        if axis == "width":
            follows = {name: max(1, vars(self)[name] * value // self.width) for name in ("ffn", "heads")}
        if axis == "layers":
            follows = {"adapted": value}
        return replace(self, **{axis: value}, **follows)


def point(shape: Shape) -> dict[str, Any]:
    """Measure a step at one size: for either library `ratio` and `saved_ratio` to the limit."""
    ids = shape.ids(shape.rows, shape.tokens)
    ways = {
        LIMIT: limit(shape.model(), ids),
        OURS: with_delta(shape.model(), ids, lora(shape.rank, shape.adapted)),
        PEFT: with_peft(shape.model(), ids, peft_lora(shape.rank, shape.adapted)),
    }
    saved = {name: way.saved_bytes() for name, way in ways.items()}
    took = shape.turns({name: way.turn for name, way in ways.items()})
    return {
        name: {
            "parameters": ways[name].parameters,
            "ratio": ratios(took[name].seconds[STEP], took[LIMIT].seconds[STEP]).to_json(),
            "saved_ratio": saved[name] / saved[LIMIT],
        }
        for name in (OURS, PEFT)
    }


def attaching(shape: Shape, blocks: int) -> dict[str, Any]:
    """Measure attaching to every linear of a model with some blocks: `milliseconds` of either library."""
    ours, theirs = shape.model(blocks), shape.model(blocks)
    took = shape.turns({OURS: attach_and_detach(ours), PEFT: wrap_and_unload(theirs)})
    times = {name: Spread.of([1e3 * s for s in took[name].seconds["attach"]]).to_json() for name in (OURS, PEFT)}
    return {"sites": LINEARS * blocks, **times}


def measure(shape: Shape) -> Result:
    """Measure all curves: `steps` by axis, each a list of points, and `attach`."""
    steps = {
        axis: [{"at": value, **point(shape.at(axis, value))} for value in values]
        for axis, values in shape.along.items()
    }
    return {"steps": steps, "attach": [attaching(shape, blocks) for blocks in shape.attached]}


def tables(result: Result) -> list[Table]:
    """Return all points of all curves."""
    size = "{layers} blocks, d={width}, ffn={ffn}, rank {rank}, batch {rows} x {tokens}".format(**result["shape"])
    columns = ("", *(f"{what}, {name}" for what in ("step", "saved") for name in (OURS, PEFT)))
    rows = [
        (
            f"{AXES[axis]} {p['at']}",
            *(show(p[name]["ratio"]) for name in (OURS, PEFT)),
            *(f"{p[name]['saved_ratio']:.2f}" for name in (OURS, PEFT)),
        )
        for axis, points in result["steps"].items()
        for p in points
    ]
    attach = [(f"{p['sites']}", f"{show(p[OURS])} ms", f"{show(p[PEFT])} ms") for p in result["attach"]]
    return [
        Table(f"A training step over the limit, one size changed at a time (else {size})", columns, rows),
        Table("Attaching, by the number of sites", ("sites", OURS, PEFT), attach),
    ]


def plots(result: Result) -> list[Plot]:
    """Return two figures a size, and one of attaching."""
    drawn: list[Plot] = []
    for axis, points in result["steps"].items():
        bare = {LIMIT: [(p["at"], same(1.0)) for p in points]}
        times = {name: [(p["at"], p[name]["ratio"]) for p in points] for name in (OURS, PEFT)}
        saved = {name: [(p["at"], same(p[name]["saved_ratio"])) for p in points] for name in (OURS, PEFT)}
        drawn.append(Curves(f"Step, by {AXES[axis]}", AXES[axis], "step / limit", times | bare))
        drawn.append(Curves(f"Saved, by {AXES[axis]}", AXES[axis], "saved / limit", saved | bare))
    attach = {name: [(p["sites"], p[name]) for p in result["attach"]] for name in (OURS, PEFT)}
    return [*drawn, Curves("Attaching, by sites", "sites", "milliseconds", attach)]


FULL = Shape(
    layers=4, width=256, ffn=688, heads=4, rows=4, tokens=64, rank=8, adapted=4, rounds=9,
    along={
        "layers": (1, 2, 4, 8, 16),
        "width": (128, 256, 512, 1024),
        "rank": (1, 4, 16, 64),
        "rows": (1, 2, 4, 8, 16),
        "tokens": (16, 64, 256, 512),
        "adapted": (1, 2, 4),
    },
    attached=(1, 4, 16, 64),
)  # fmt: skip
QUICK = Shape(
    layers=2, width=32, ffn=64, heads=2, rows=2, tokens=8, rank=2, adapted=2, rounds=2,
    along={"layers": (1, 2), "width": (32, 64), "rank": (1, 2), "rows": (1, 2), "tokens": (4, 8), "adapted": (1, 2)},
    attached=(1, 2),
)  # fmt: skip
BENCHMARK = Benchmark(full=FULL, quick=QUICK, measure=measure, tables=tables, plots=plots)
