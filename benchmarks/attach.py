"""What attaching costs, against peft: LoRA of rank 8 on every linear of a Llama's blocks.

The verbs are attaching and taking off, also on the meta device at the width of an 8B model (d=4096, ffn=14336), loading
from disk, and sixteen attachments one after the other. The ratio is that of deltatune to peft inside each round.

A call is one of an adapted module of the first block, with one token and without gradient. The floor of a LoRA is the same
maths written out by hand: `y = linear(x); y + s * linear(linear(x, A), B)`, so what is extra is what a library adds to
LoRA's maths. The floor of `nothing`, a method with LoRA's leaves that returns `y`, is the bare module.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltatune as dt
from benchmarks.benchmark import Benchmark, Result, Table
from benchmarks.measure import Clock, Turn, differences, ratios, show
from benchmarks.plots import Bars, Plot
from benchmarks.shape import LlamaShape, llama
from benchmarks.twins import ALPHA, EVERY_LINEAR, LORA, RANK, peft_lora
from deltatune.core.leaf import Leaf, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site

MANY = 16


@dataclass(frozen=True)
class Nothing(OnLinear):
    """W' = W, with the leaves of a LoRA: what a port costs when its maths costs nothing."""

    where = EVERY_LINEAR

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"A": Leaf((RANK, site.d_in), Zeros()), "B": Leaf((site.d_out, RANK), Zeros())}

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y


@dataclass(frozen=True, kw_only=True)
class Shape(LlamaShape):
    """A model, and how often one module is called in a round."""

    calls: int


def attach_and_detach(model: nn.Module) -> Turn:
    """deltatune: attach a delta with fresh weights, and take it off."""

    def turn(clock: Clock) -> None:
        with clock("attach"):
            attachment = dt.attach(model, LORA)
        with clock("detach"):
            attachment.detach()

    return turn


def wrap_and_unload(model: nn.Module) -> Turn:
    """peft: wrap the model, and restore it."""
    from peft import get_peft_model

    def turn(clock: Clock) -> None:
        with clock("attach"):
            wrapped: Any = get_peft_model(model, peft_lora())  # type: ignore[arg-type]
        with clock("detach"):
            wrapped.unload()

    return turn


def load_ours(model: nn.Module, folder: Path) -> Turn:
    """deltatune: read weights from disk and attach them."""
    dt.save(dt.init(LORA, model), folder)

    def turn(clock: Clock) -> None:
        with clock("load"):
            attachment = dt.load(model, folder)
        attachment.detach()

    return turn


def load_peft(model: nn.Module, folder: Path) -> Turn:
    """peft: read an adapter from disk and wrap the model with it."""
    from peft import PeftModel, get_peft_model

    wrapped: Any = get_peft_model(model, peft_lora())  # type: ignore[arg-type]
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    wrapped.unload()

    def turn(clock: Clock) -> None:
        with clock("load"):
            loaded: Any = PeftModel.from_pretrained(model, folder)  # type: ignore[arg-type]
        loaded.unload()

    return turn


def many_ours(model: nn.Module) -> Turn:
    """deltatune: attachments one after the other, all of them acting."""

    def turn(clock: Clock) -> None:
        attached = []
        for index in range(MANY):
            with clock(f"attachment {index + 1}"):
                attached.append(dt.attach(model, LORA, seed=index))
        for attachment in attached:
            attachment.detach()

    return turn


def many_peft(model: nn.Module) -> Turn:
    """peft: adapters one after the other, the first of them active."""
    from peft import get_peft_model

    def turn(clock: Clock) -> None:
        with clock("attachment 1"):
            wrapped: Any = get_peft_model(model, peft_lora(), "adapter1")  # type: ignore[arg-type]
        for index in range(1, MANY):
            with clock(f"attachment {index + 1}"):
                wrapped.add_adapter(f"adapter{index + 1}", peft_lora())
        wrapped.unload()

    return turn


def verbs(shape: Shape, folder: Path) -> list[dict[str, Any]]:
    """Measure what is done to a whole model; rows with `what`, `unit`, `deltatune` and `peft` (medians) and their `ratio`."""
    rows = []
    for layers in (1, shape.layers):
        ours, theirs = shape.model(layers), shape.model(layers)
        took = shape.turns({"deltatune": attach_and_detach(ours), "peft": wrap_and_unload(theirs)})
        rows += [verb(f"{what}, {7 * layers} linears", took, what) for what in ("attach", "detach")]
    with torch.device("meta"):
        ours, theirs = (llama(shape.layers, 4096, 14336, 32, vocabulary=128256) for _ in range(2))
    took = shape.turns({"deltatune": attach_and_detach(ours), "peft": wrap_and_unload(theirs)})
    rows.append(verb(f"attach, {7 * shape.layers} linears of an 8B shape on the meta device", took, "attach"))
    ours, theirs = shape.model(shape.layers), shape.model(shape.layers)
    took = shape.turns({"deltatune": load_ours(ours, folder / "ours"), "peft": load_peft(theirs, folder / "peft")})
    rows.append(verb(f"load from disk, {7 * shape.layers} linears", took, "load"))
    took = shape.turns({"deltatune": many_ours(ours), "peft": many_peft(theirs)}, max(2, shape.rounds // 3))
    rows += [verb(f"attachment {n} of {MANY}, {7 * shape.layers} linears", took, f"attachment {n}") for n in (1, MANY)]
    return rows


def verb(label: str, took: dict[str, Clock], what: str) -> dict[str, Any]:
    """Return one row of `verbs`."""
    medians = {name: 1e3 * took[name].median(what) for name in ("deltatune", "peft")}
    ratio = ratios(took["deltatune"].seconds[what], took["peft"].seconds[what])
    return {"what": label, "unit": "ms", **medians, "ratio": ratio.to_json()}


def calling(module: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> Turn:
    """Call one module again and again."""

    def turn(clock: Clock) -> None:
        with clock("call", calls):
            for _ in range(calls):
                module(x)

    return turn


def by_hand(linear: nn.Module, A: Tensor, B: Tensor) -> Callable[[Tensor], Tensor]:
    """LoRA's maths around a bare module, with nothing else."""
    scale = ALPHA / RANK

    def call(x: Tensor) -> Tensor:
        return linear(x) + scale * F.linear(F.linear(x, A), B)

    return call


@torch.no_grad()
def calls(shape: Shape) -> list[dict[str, Any]]:
    """Measure one call of `q_proj` of the first block; rows with `what`, `microseconds`, `extra` over the `floor`, and `ratio`."""
    from peft import get_peft_model

    bare, nothing, ours, theirs = (shape.model(1) for _ in range(4))
    dt.attach(nothing, Nothing().at(EVERY_LINEAR))
    leaves = dict(dt.attach(ours, LORA).named_parameters())
    get_peft_model(theirs, peft_lora())  # type: ignore[arg-type]
    modules: dict[str, Any] = {
        name: model.get_submodule("model.layers.0.self_attn.q_proj")
        for name, model in (
            ("bare", bare),
            ("deltatune, nothing", nothing),
            ("deltatune LoRA", ours),
            ("peft LoRA", theirs),
        )
    }
    A, B = (next(t for name, t in leaves.items() if name.endswith(f"q_proj.{leaf}")) for leaf in "AB")
    modules["LoRA by hand"] = by_hand(modules["bare"], A, B)
    x = torch.randn(1, 1, shape.width).to(shape.device)
    took = shape.turns({name: calling(module, x, shape.calls) for name, module in modules.items()})
    floors = {
        "LoRA by hand": "bare",
        "deltatune, nothing": "bare",
        "deltatune LoRA": "LoRA by hand",
        "peft LoRA": "LoRA by hand",
    }
    return [call(name, floor, took) for name, floor in floors.items()]


def call(name: str, floor: str, took: dict[str, Clock]) -> dict[str, Any]:
    """Return one row of `calls`."""
    above, below = took[name].seconds["call"], took[floor].seconds["call"]
    extra = differences([1e6 * s for s in above], [1e6 * s for s in below])
    row = {"what": name, "floor": floor, "microseconds": 1e6 * took[name].median("call")}
    return {**row, "extra": extra.to_json(), "ratio": ratios(above, below).to_json()}


def measure(shape: Shape) -> Result:
    """Measure verbs and calls."""
    with tempfile.TemporaryDirectory() as folder:
        return {"verbs": verbs(shape, Path(folder)), "calls": calls(shape)}


def tables(result: Result) -> list[Table]:
    """Return both tables for people."""
    verb_rows = [
        (r["what"], f"{r['deltatune']:.1f} ms", f"{r['peft']:.1f} ms", show(r["ratio"])) for r in result["verbs"]
    ]
    call_rows = [
        (r["what"], f"{r['microseconds']:.1f} us", f"{show(r['extra'], 1)} us", r["floor"]) for r in result["calls"]
    ]
    size = "{layers} layers, d={width}, ffn={ffn}".format(**result["shape"])
    title = f"LoRA(rank={RANK}) on every linear of a Llama ({size})"
    called = f"One call of one adapted module (d={result['shape']['width']}, one token)"
    return [
        Table(title, ("", "deltatune", "peft", "deltatune / peft"), verb_rows),
        Table(called, ("", "call", "extra", "over"), call_rows),
    ]


def plots(result: Result) -> list[Plot]:
    """Return what each verb takes, as a share of what peft takes, and what a call costs."""
    return [
        Bars("Time of deltatune / peft", {r["what"]: r["ratio"]["median"] for r in result["verbs"]}),
        Bars("One call over its floor", {r["what"]: r["extra"]["median"] for r in result["calls"]}, " us", 1),
    ]


BENCHMARK = Benchmark(
    full=Shape(layers=32, width=256, ffn=688, heads=8, rounds=15, calls=2000),
    quick=Shape(layers=2, width=32, ffn=64, heads=2, rounds=2, calls=20),
    measure=measure,
    tables=tables,
    plots=plots,
)
