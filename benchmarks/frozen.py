"""What training spares where the lower blocks are frozen, from the second epoch on.

`tune` trains a Llama of eight layers, optimizer included, on one thread in fp32. What the blocks below the lowest trained
site make of each example is computed in the first epoch and kept; told is the time of that epoch over that of a later
one, and the same without a cache. The methods act in the last block, in the last two, or beside the stack.

Two kinds of text: one whose every token is to be predicted, and one that ends in an answer of a few tokens, as the
examples of tasks do. The last feed-forward layer and the head then see these few tokens alone, cache or not.

`saved` is what autograd keeps for the backward pass of one batch whose every token counts, over what it keeps for LoRA on
every linear.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deltatune as dt
from benchmarks.benchmark import Benchmark, Result, Table
from benchmarks.measure import Clock, Spread, ratios, show
from benchmarks.plots import Bars, Plot
from benchmarks.shape import LlamaShape
from benchmarks.twins import LORA, with_delta
from deltatune.tuning.cache import Bound
from deltatune.tuning.encode import IGNORED, Row
from deltatune.tuning.loop import Loop
from deltatune.tuning.recipe import Recipe

FIRST, LATER = "first epoch", "a later epoch"
LATERS = 2  # epochs after the first
BOUNDS = {"cache": Bound(10**10), "no cache": Bound(0)}


@dataclass(frozen=True, kw_only=True)
class Shape(LlamaShape):
    """A model, an epoch of some batches, and how many tokens an answer has."""

    rows: int
    tokens: int
    batches: int
    answer: int

    def texts(self, counted: int) -> list[Row]:
        """Return the rows of an epoch, in which the last `counted` tokens have labels."""
        texts = [tuple(ids) for ids in self.ids(self.rows * self.batches, self.tokens).tolist()]
        return [Row(ids, (IGNORED,) * (len(ids) - counted) + ids[len(ids) - counted :]) for ids in texts]


def deltas(layers: int) -> dict[str, Any]:
    """Return the methods under test."""
    upper = f"{{attn.{{q,k,v,o}},ffn.{{gate,up,down}}}}[{layers - 2}:]"
    return {
        "LastLayers(1)": dt.LastLayers(1),
        "LoRA in two blocks": dt.LoRA(rank=8).at(upper),
        "LadderSideTuning": dt.LadderSideTuning(),
    }


def epochs(shape: Shape, delta: Any, counted: int, bound: Bound) -> Callable[[Clock], None]:
    """Return a turn that trains a fresh delta for some epochs."""
    model, rows = shape.model(), shape.texts(counted)
    recipe = Recipe(steps=shape.batches * (1 + LATERS), batch=shape.rows, eval_every=0, checkpoint_every=0)

    def turn(clock: Clock) -> None:
        with dt.attach(model, delta) as attachment, tempfile.TemporaryDirectory() as folder:
            loop = Loop(attachment, rows, 0, recipe, 0, Path(folder), bound=bound)
            loop.prepare()
            order = loop.order()
            with loop.log:
                for what, times in ((FIRST, 1), (LATER, LATERS)):
                    with clock(what, times):
                        for _ in range(times * shape.batches):
                            loop.step(next(order))

    return turn


def measure(shape: Shape) -> Result:
    """Measure every method with and without a cache on both kinds of text, and what it keeps for its backward pass."""
    texts = {"every token": shape.tokens, "an answer": shape.answer}
    found = deltas(shape.layers)
    rows = []
    for text, counted in texts.items():
        turns = {
            (method, kept): epochs(shape, delta, counted, bound)
            for method, delta in found.items()
            for kept, bound in BOUNDS.items()
        }
        took = shape.turns({" ".join(key): turn for key, turn in turns.items()})
        rows += [_row(text, method, {kept: took[f"{method} {kept}"] for kept in BOUNDS}) for method in found]
    ids = shape.ids(shape.rows, shape.tokens)
    lora = with_delta(shape.model(), ids, LORA).saved_bytes()
    saved = {method: with_delta(shape.model(), ids, delta).saved_bytes() / lora for method, delta in found.items()}
    return {"epochs": rows, "lora_bytes": lora, "saved": saved}


def _row(text: str, method: str, clocks: dict[str, Clock]) -> dict[str, Any]:
    seconds = {kept: clock.seconds for kept, clock in clocks.items()}
    return {
        "text": text,
        "method": method,
        "first": 1e3 * clocks["cache"].median(FIRST),
        "later": 1e3 * clocks["cache"].median(LATER),
        "speedup": ratios(seconds["cache"][FIRST], seconds["cache"][LATER]).to_json(),
        "overhead": ratios(seconds["cache"][FIRST], seconds["no cache"][FIRST]).to_json(),
        "uncached": Spread.of([1e3 * s for s in seconds["no cache"][LATER]]).to_json(),
    }


def tables(result: Result) -> list[Table]:
    """Return the epochs, and what is kept for the backward pass."""
    size = "{layers} layers, d={width}, ffn={ffn}, {batches} batches of {rows} x {tokens}".format(**result["shape"])
    columns = ("", "first", "later", "first / later", "first / without cache", "later, without")
    rows = [
        (
            f"{r['method']}, {r['text']}",
            f"{r['first']:.0f} ms",
            f"{r['later']:.0f} ms",
            show(r["speedup"]),
            show(r["overhead"]),
            f"{r['uncached']['median']:.0f} ms",
        )
        for r in result["epochs"]
    ]
    saved = [(method, f"{share:.2f}") for method, share in result["saved"].items()]
    return [
        Table(f"Epochs of a Llama ({size}), where {result['shape']['answer']} tokens are an answer", columns, rows),
        Table("Saved for backward, over LoRA on every linear", ("", "saved / LoRA's"), saved),
    ]


def plots(result: Result) -> list[Plot]:
    """Return how much faster a later epoch is, and what is kept for the backward pass."""
    faster = {f"{r['method']}, {r['text']}": r["speedup"]["median"] for r in result["epochs"]}
    of = {f"{r['method']}, {r['text']}": r["text"] for r in result["epochs"]}
    return [
        Bars("First epoch / a later one", faster, unit="x", of=of),
        Bars("Saved for backward / LoRA's", result["saved"]),
    ]


BENCHMARK = Benchmark(
    full=Shape(layers=8, width=768, ffn=2048, heads=12, rows=4, tokens=128, batches=3, answer=4, rounds=5),
    quick=Shape(layers=3, width=32, ffn=64, heads=2, rows=2, tokens=8, batches=1, answer=2, rounds=2),
    measure=measure,
    tables=tables,
    plots=plots,
)
