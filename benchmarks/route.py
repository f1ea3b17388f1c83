"""What routing costs: a batch whose rows each have their own LoRA, against one LoRA for all and against the bare backbone.

    python -m benchmarks.route [--quick] [--out FOLDER]

LoRA of rank 8 on every linear of a Llama's blocks, 32 rows. `route.json` holds `benchmark`, `quick`, `rounds`, `machine`,
`shape`, and two lists:

- `batches`: one forward pass inside a route that is entered already, of one token a row (decoding) and of 64 (prefill):
  `what`, `tokens`, `milliseconds` (median), `over_bare` and `over_single` (ratios inside each round: median, low, high;
  peft's over peft's own single adapter).
- `members`: the first and the last member of a large pool: `what`, `first`, `last` (median milliseconds), `ratio`
  (last / first inside each round). The verbs are adding weights, adding them from disk, entering a route to them, and
  removing them.
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
from benchmarks.measure import (
    ALPHA,
    EVERY_LINEAR,
    RANK,
    Clock,
    Figures,
    Spread,
    llama,
    machine,
    options,
    peft_lora,
    publish,
    ratios,
    show,
    take_turns,
)

LORA = dt.LoRA(rank=RANK, alpha=ALPHA).at(EVERY_LINEAR)
VERBS = ("add", "load from disk", "enter a route to it", "remove")


@dataclass(frozen=True)
class Shape:
    """How large and how long to measure."""

    layers: int
    width: int
    ffn: int
    heads: int
    rows: int
    tokens: tuple[int, ...]
    resident: int
    rounds: int

    def model(self) -> nn.Module:
        """Build the backbone."""
        return llama(self.layers, self.width, self.ffn, self.heads).eval()


FULL = Shape(layers=32, width=256, ffn=688, heads=8, rows=32, tokens=(1, 64), resident=1000, rounds=15)
QUICK = Shape(layers=2, width=32, ffn=64, heads=2, rows=4, tokens=(1, 3), resident=8, rounds=2)


def weights(model: nn.Module, count: int) -> dict[str, dt.Weights]:
    """Return many LoRAs, each with tensors of its own."""
    start = dt.init(LORA, model)
    generator = torch.Generator().manual_seed(0)

    def fresh() -> dt.Weights:
        made = {n: torch.empty_like(t).normal_(std=0.02, generator=generator) for n, t in start.tensors.items()}
        return replace(start, tensors=made)

    return {f"user{index}": fresh() for index in range(count)}


def passing(model: nn.Module, x: Tensor) -> Callable[[Clock], None]:
    """One forward pass, after one that is not measured."""

    def turn(clock: Clock) -> None:
        model(input_ids=x)
        with clock("pass"):
            model(input_ids=x)

    return turn


def single(model: nn.Module, one: dt.Weights, x: Tensor) -> Callable[[Clock], None]:
    """One attached LoRA for all rows."""
    inner = passing(model, x)

    def turn(clock: Clock) -> None:
        with dt.attach(model, one):
            inner(clock)

    return turn


def routed(pool: dt.Pool, rows: list[str], x: Tensor) -> Callable[[Clock], None]:
    """Each row with its own LoRA."""
    inner = passing(pool.model, x)

    def turn(clock: Clock) -> None:
        with pool.route(rows):
            inner(clock)

    return turn


def peft_mixed(model: nn.Module, rows: int) -> Callable[[Tensor, bool], Callable[[Clock], None]]:
    """peft: as many adapters as rows, named row by row, or the first of them for all."""
    from peft import get_peft_model

    names = [f"user{index}" for index in range(rows)]
    wrapped: Any = get_peft_model(model, peft_lora(), names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        wrapped.add_adapter(name, peft_lora())
    wrapped.eval()

    def of(x: Tensor, mixed: bool) -> Callable[[Clock], None]:
        given = {"input_ids": x, "adapter_names": names} if mixed else {"input_ids": x}

        def turn(clock: Clock) -> None:
            wrapped(**given)
            with clock("pass"):
                wrapped(**given)

        return turn

    return of


@torch.no_grad()
def batches(shape: Shape) -> list[dict[str, Any]]:
    """Measure forward passes."""
    few, many, theirs = shape.model(), shape.model(), shape.model()
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
        x = torch.randint(0, 1000, (shape.rows, tokens), generator=torch.Generator().manual_seed(tokens))
        contestants = {
            "bare backbone": passing(few, x),
            "deltatune, one for all": single(few, members[names[0]], x),
            f"deltatune, {shape.rows} different": routed(small, names[: shape.rows], x),
            f"deltatune, {shape.rows} of {shape.resident} resident": routed(large, names[-shape.rows :], x),
            "peft, one for all": by_peft(x, False),
            f"peft, {shape.rows} different": by_peft(x, True),
        }
        took = take_turns(contestants, shape.rounds)
        rows += [batch(what, tokens, took) for what in contestants]
    return rows


def batch(what: str, tokens: int, took: Mapping[str, Clock]) -> dict[str, Any]:
    """Return one row of `batches`."""
    own, bare = took[what].seconds["pass"], took["bare backbone"].seconds["pass"]
    one = took[f"{'peft' if what.startswith('peft') else 'deltatune'}, one for all"].seconds["pass"]
    spreads = {"over_bare": ratios(own, bare).to_json(), "over_single": ratios(own, one).to_json()}
    return {"what": what, "tokens": tokens, "milliseconds": 1e3 * took[what].median("pass"), **spreads}


def joining(pool: dt.Pool, one: dt.Weights, folder: Path) -> Callable[[Clock], None]:
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
    """Measure what is done to one member of an empty and of a full pool."""
    empty, full = shape.model(), shape.model()
    many = weights(full, shape.resident)
    one = next(iter(many.values()))
    dt.save(one, folder)
    pools = {"first": dt.pool(empty), "last": dt.pool(full, many)}
    took = take_turns({name: joining(pool, one, folder) for name, pool in pools.items()}, shape.rounds)
    rows = []
    for what in VERBS:
        medians = {name: 1e3 * took[name].median(what) for name in ("first", "last")}
        ratio = ratios(took["last"].seconds[what], took["first"].seconds[what])
        rows.append({"what": what, **medians, "ratio": ratio.to_json()})
    return rows


def tables(result: dict[str, Any]) -> list[Figures]:
    """Return both tables for people."""
    shape = result["shape"]
    size = "{layers} layers, d={width}, ffn={ffn}, {rows} rows".format(**shape)
    batch_rows = [
        (
            f"{r['what']}, {r['tokens']} token{'s' if r['tokens'] > 1 else ''} a row",
            f"{r['milliseconds']:.1f} ms",
            show(Spread(**r["over_bare"])),
            show(Spread(**r["over_single"])),
        )
        for r in result["batches"]
    ]
    member_rows = [
        (r["what"], f"{r['first']:.2f} ms", f"{r['last']:.2f} ms", show(Spread(**r["ratio"])))
        for r in result["members"]
    ]
    return [
        Figures(
            f"A batch of rows with their own LoRA(rank={RANK}) on every linear of a Llama ({size})",
            ("", "pass", "over the bare backbone", "over one for all"),
            batch_rows,
        ),
        Figures(
            f"A member of a pool: the first, and the {shape['resident']}th",
            ("", "first", "last", "last / first"),
            member_rows,
        ),
    ]


def main() -> None:
    """Measure, print and write."""
    quick, out = options("Time mixed batches and large pools against peft.")
    shape = QUICK if quick else FULL
    at = machine()
    with tempfile.TemporaryDirectory() as folder:
        measured = {"batches": batches(shape), "members": members(shape, Path(folder))}
    size = {name: vars(shape)[name] for name in ("layers", "width", "ffn", "rows", "resident")}
    result = {"quick": quick, "rounds": shape.rounds, "machine": at, "shape": size, **measured}
    publish("route", out, result, tables(result))


if __name__ == "__main__":
    main()
