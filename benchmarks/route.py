"""What routing costs: a batch whose rows each have their own LoRA, against one LoRA for all and the bare backbone.

LoRA of rank 8 on every linear of a Llama's blocks, 32 rows. A pass is a forward pass inside a route that is entered already,
of one token a row (decoding) and of 64 (prefill); its ratios are those to the bare backbone and to one LoRA for all rows,
peft's to peft's own.

A member of a pool is measured when it is the first and when it is the last of a large pool: adding weights, adding them
from disk, entering a route to them, and removing them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from benchmarks.benchmark import Benchmark, Result, Table
from benchmarks.measure import Clock, Turn, ratios, show
from benchmarks.plots import Bars, Plot
from benchmarks.shape import LlamaShape
from benchmarks.twins import LORA, RANK, peft_lora

VERBS = ("add", "load from disk", "enter a route to it", "remove")


@dataclass(frozen=True, kw_only=True)
class Shape(LlamaShape):
    """A model, a batch of some lengths, and the members of the large pool."""

    rows: int
    tokens: tuple[int, ...]
    resident: int


def weights(model: nn.Module, count: int) -> dict[str, dt.Weights]:
    """Return many LoRAs, each with tensors of its own."""
    start = dt.init(LORA, model)
    generator = torch.Generator().manual_seed(0)

    def fresh() -> dt.Weights:
        made = {n: torch.empty_like(t).normal_(std=0.02, generator=generator) for n, t in start.tensors.items()}
        return replace(start, tensors=made)

    return {f"user{index}": fresh() for index in range(count)}


def passing(model: nn.Module, x: Tensor) -> Turn:
    """One forward pass, after one that is not measured."""

    def turn(clock: Clock) -> None:
        model(input_ids=x)
        with clock("pass"):
            model(input_ids=x)

    return turn


def single(model: nn.Module, one: dt.Weights, x: Tensor) -> Turn:
    """One attached LoRA for all rows."""
    inner = passing(model, x)

    def turn(clock: Clock) -> None:
        with dt.attach(model, one):
            inner(clock)

    return turn


def routed(pool: dt.Pool, rows: list[str], x: Tensor) -> Turn:
    """Each row with its own LoRA."""
    inner = passing(pool.model, x)

    def turn(clock: Clock) -> None:
        with pool.route(rows):
            inner(clock)

    return turn


def peft_mixed(model: nn.Module, rows: int) -> Callable[[Tensor, bool], Turn]:
    """peft: as many adapters as rows, named row by row, or the first of them for all."""
    from peft import get_peft_model

    names = [f"user{index}" for index in range(rows)]
    wrapped: Any = get_peft_model(model, peft_lora(), names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        wrapped.add_adapter(name, peft_lora())
    wrapped.eval()

    def of(x: Tensor, mixed: bool) -> Turn:
        given = {"input_ids": x, "adapter_names": names} if mixed else {"input_ids": x}

        def turn(clock: Clock) -> None:
            wrapped(**given)
            with clock("pass"):
                wrapped(**given)

        return turn

    return of


@torch.no_grad()
def batches(shape: Shape) -> list[dict[str, Any]]:
    """Measure forward passes; rows with `what`, `tokens`, `milliseconds` (median), and ratios `over_bare` and `over_single`."""
    few, many, theirs = shape.model().eval(), shape.model().eval(), shape.model().eval()
    members = weights(few, shape.resident)
    names = list(members)
    small = dt.pool(few, {name: members[name] for name in names[: shape.rows]})
    large = dt.pool(many, members)
    for name in names:
        with large.route([name]):  # so that it is resident
            pass
    by_peft = peft_mixed(theirs, shape.rows)
    rows = []
    for tokens in shape.tokens:
        x = shape.ids(shape.rows, tokens)
        contestants = {
            "bare backbone": passing(few, x),
            "deltatune, one for all": single(few, members[names[0]], x),
            f"deltatune, {shape.rows} different": routed(small, names[: shape.rows], x),
            f"deltatune, {shape.rows} of {shape.resident} resident": routed(large, names[-shape.rows :], x),
            "peft, one for all": by_peft(x, False),
            f"peft, {shape.rows} different": by_peft(x, True),
        }
        took = shape.turns(contestants)
        rows += [batch(what, tokens, took) for what in contestants]
    return rows


def batch(what: str, tokens: int, took: Mapping[str, Clock]) -> dict[str, Any]:
    """Return one row of `batches`."""
    own, bare = took[what].seconds["pass"], took["bare backbone"].seconds["pass"]
    one = took[f"{'peft' if what.startswith('peft') else 'deltatune'}, one for all"].seconds["pass"]
    spreads = {"over_bare": ratios(own, bare).to_json(), "over_single": ratios(own, one).to_json()}
    return {"what": what, "tokens": tokens, "milliseconds": 1e3 * took[what].median("pass"), **spreads}


def joining(pool: dt.Pool, one: dt.Weights, folder: Path) -> Turn:
    """Add a member, route to it and remove it; then from disk."""

    def turn(clock: Clock) -> None:
        with clock("add"):
            pool.add("new", one)
        route = pool.route(["new", None])
        with clock("enter a route to it"):
            route.__enter__()
        route.__exit__(None, None, None)
        with clock("remove"):
            pool.remove("new")
        with clock("load from disk"):
            pool.add("new", folder)
        pool.remove("new")

    return turn


def members(shape: Shape, folder: Path) -> list[dict[str, Any]]:
    """Measure what is done to one member of an empty and of a full pool; rows with `what`, `first`, `last` (ms) and `ratio`."""
    empty, full = shape.model().eval(), shape.model().eval()
    many = weights(full, shape.resident)
    one = next(iter(many.values()))
    dt.save(one, folder)
    pools = {"first": dt.pool(empty), "last": dt.pool(full, many)}
    took = shape.turns({name: joining(pool, one, folder) for name, pool in pools.items()})
    rows = []
    for what in VERBS:
        medians = {name: 1e3 * took[name].median(what) for name in ("first", "last")}
        ratio = ratios(took["last"].seconds[what], took["first"].seconds[what])
        rows.append({"what": what, **medians, "ratio": ratio.to_json()})
    return rows


def measure(shape: Shape) -> Result:
    """Measure batches and members."""
    with tempfile.TemporaryDirectory() as folder:
        return {"batches": batches(shape), "members": members(shape, Path(folder))}


def tables(result: Result) -> list[Table]:
    """Return both tables for people."""
    shape = result["shape"]
    size = "{layers} layers, d={width}, ffn={ffn}, {rows} rows".format(**shape)
    batch_rows = [
        (_label(r), f"{r['milliseconds']:.1f} ms", show(r["over_bare"]), show(r["over_single"]))
        for r in result["batches"]
    ]
    member_rows = [
        (r["what"], f"{r['first']:.2f} ms", f"{r['last']:.2f} ms", show(r["ratio"])) for r in result["members"]
    ]
    title = f"A batch of rows with their own LoRA(rank={RANK}) on every linear of a Llama ({size})"
    member = f"A member of a pool: the first, and the {shape['resident']}th"
    return [
        Table(title, ("", "pass", "over the bare backbone", "over one for all"), batch_rows),
        Table(member, ("", "first", "last", "last / first"), member_rows),
    ]


def _label(row: dict[str, Any]) -> str:
    return f"{row['what']}, {row['tokens']} token{'s' if row['tokens'] > 1 else ''} a row"


def plots(result: Result) -> list[Plot]:
    """Return each kind of batch over the bare backbone, one figure a length."""
    return [
        Bars(
            f"A pass over the bare backbone, {tokens} token{'s' if tokens > 1 else ''} a row",
            {r["what"]: r["over_bare"]["median"] for r in result["batches"] if r["tokens"] == tokens},
        )
        for tokens in dict.fromkeys(r["tokens"] for r in result["batches"])
    ]


BENCHMARK = Benchmark(
    full=Shape(layers=32, width=256, ffn=688, heads=8, rows=32, tokens=(1, 64), resident=1000, rounds=9),
    quick=Shape(layers=2, width=32, ffn=64, heads=2, rows=4, tokens=(1, 3), resident=8, rounds=2),
    measure=measure,
    tables=tables,
    plots=plots,
)
