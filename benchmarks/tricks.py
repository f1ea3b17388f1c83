"""What each way to spare work and memory gives, alone and with those before it: LoRA of rank 8 on every linear of a Llama.

The first row has none of them: LoRA as three products of autograd, the loss of all logits, everything in fp32. The last eight tokens
of each row are answers whose labels count, as in a task, and rows are of unlike length: a fifth of the batch is padding.

- *Fused LoRA* makes the input of a layer again in the backward pass instead of keeping it, writes over the layer's output, and
  has the short side of every product in front.
- *One backward* sums the gradients of a layer's input in one place; it needs fused LoRA.
- *Answers only* computes the last feed-forward layer, the head and the loss for the tokens whose labels count.
- *No padding* computes the other feed-forward layers for the tokens that are there; it needs what answers only is part of.
- *Lean norms* computes a norm and its gradient in one function each, instead of operation by operation.
- *Gated product* computes silu(g) u in one function, which keeps two tensors where its parts keep three.
- *oneDNN products* asks oneDNN for products in fp32 too, where it is exact, and attends by them.
- *bf16* holds the frozen weights in bfloat16 and attends by matrix products; leaves stay in fp32, and are cast together.

A step is forward and backward pass, without an optimizer. What is kept of frozen blocks from epoch to epoch is told by `frozen`,
batches by length and whole trainings by `end_to_end`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import deltatune as dt
from benchmarks.benchmark import Benchmark, Result, Table
from benchmarks.measure import ratios, show
from benchmarks.plots import Bars, Plot
from benchmarks.shape import LlamaShape
from benchmarks.training import STEP, Contestant
from benchmarks.twins import LORA
from deltatune.backbones.dense import attend_densely
from deltatune.backbones.gated import gated
from deltatune.backbones.lean import make_lean, norm
from deltatune.core.casts import Casts
from deltatune.core.ports import BaseView
from deltatune.core.products import products
from deltatune.methods import _low_rank
from deltatune.tuning.encode import IGNORED
from deltatune.tuning.loss import Loss, OwnLoss, TokenLoss, make_loss

FUSED, BACKWARD, ANSWERS, PADDING, LEAN = "fused LoRA", "one backward", "answers only", "no padding", "lean norms"
GATED, PRODUCTS, BF16 = "gated product", "oneDNN products", "bf16"
TRICKS = (FUSED, BACKWARD, ANSWERS, PADDING, LEAN, GATED, PRODUCTS, BF16)
FINDS = {LEAN: norm, GATED: gated}
ALONE = {name: (name,) for name in TRICKS} | {BACKWARD: (FUSED, BACKWARD), PADDING: (ANSWERS, PADDING)}
TOGETHER = {name: TRICKS[: place + 1] for place, name in enumerate(TRICKS)}


@dataclass(frozen=True, kw_only=True)
class Shape(LlamaShape):
    """A model, a batch, and how many tokens of each row are answers."""

    rows: int
    tokens: int
    answers: int


@contextmanager
def without_fused_lora() -> Iterator[None]:
    """The scope in which LoRA is three products of autograd."""
    before = _low_rank.fusible
    _low_rank.fusible = lambda: False
    try:
        yield
    finally:
        _low_rank.fusible = before


@contextmanager
def without_one_backward() -> Iterator[None]:
    """The scope in which autograd sums the gradients of a layer's input."""
    before = BaseView.plain
    BaseView.plain = property(lambda view: None)  # type: ignore[assignment]
    try:
        yield
    finally:
        BaseView.plain = before  # type: ignore[method-assign]


def contestant(shape: Shape, tricks: tuple[str, ...]) -> Contestant:
    """Build LoRA on a model of its own, with some of the tricks."""
    model: Any = shape.model()
    for trick in FINDS.keys() & set(tricks):
        make_lean(model, [FINDS[trick]])
    attachment = dt.attach(model, LORA)
    if BF16 in tricks:
        model.to(torch.bfloat16)
        attachment.leaves.float()
    if BF16 in tricks or PRODUCTS in tricks:
        attend_densely(model)
    ids = shape.ids(shape.rows, shape.tokens)
    batch = padded(ids, shape.answers)
    loss = answers_only(model, batch, tricks) if ANSWERS in tricks else OwnLoss(model)

    casts = Casts(attachment, next(model.model.parameters()).dtype)

    def step() -> Tensor:
        with ExitStack() as scopes:
            if FUSED not in tricks:
                scopes.enter_context(without_fused_lora())
            if BACKWARD not in tricks:
                scopes.enter_context(without_one_backward())
            scopes.enter_context(casts.made())
            return loss(batch)

    scope = partial(products, ids.device) if PRODUCTS in tricks else nullcontext
    return Contestant(step, list(attachment.parameters()), model, str(attachment.delta), scope)


def padded(ids: Tensor, answers: int) -> dict[str, Tensor]:
    """Return a batch of rows from the whole width down to three fifths of it, each of which ends in an answer."""
    ends = torch.linspace(ids.shape[1], 0.6 * ids.shape[1], len(ids), device=ids.device).long()[:, None]
    place = torch.arange(ids.shape[1], device=ids.device)
    asked = (place < ends) & (place >= ends - answers)
    return {"input_ids": ids, "attention_mask": (place < ends).long(), "labels": ids.masked_fill(~asked, IGNORED)}


def answers_only(model: Any, batch: dict[str, Tensor], tricks: tuple[str, ...]) -> Loss:
    """Return the loss of `tune`, which looks at what padding there is or not."""
    loss = make_loss(model, batch)
    assert isinstance(loss, TokenLoss)
    return loss if PADDING in tricks else replace(loss, reading=replace(loss.reading, others=()))


def measure(shape: Shape) -> Result:
    """Measure all selections of tricks that are told, each once."""
    chosen = dict.fromkeys([(), *ALONE.values(), *TOGETHER.values()])
    ways = {tricks: contestant(shape, tricks) for tricks in chosen}
    saved = {tricks: way.saved_bytes() for tricks, way in ways.items()}
    names: dict[tuple[str, ...], str] = {tricks: ", ".join(tricks) for tricks in ways}
    took = shape.turns({names[tricks]: way.turn for tricks, way in ways.items()})

    def told(tricks: tuple[str, ...]) -> dict[str, object]:
        return {
            "ratio": ratios(took[names[tricks]].seconds[STEP], took[names[()]].seconds[STEP]).to_json(),
            "saved_ratio": saved[tricks] / saved[()],
        }

    return {
        "milliseconds": 1e3 * took[names[()]].median(STEP),
        "saved_bytes": saved[()],
        "rows": [{"trick": name, "alone": told(ALONE[name]), "together": told(TOGETHER[name])} for name in TRICKS],
    }


def tables(result: Result) -> list[Table]:
    """Return what each gives of the step and of what is saved, alone and with those before it."""
    first = ("none", f"{result['milliseconds']:.0f} ms", f"{result['saved_bytes'] / 2**20:.1f} MiB", "1.00", "1.00")
    rows = [first, *(_row(row) for row in result["rows"])]
    size = "{layers} layers, d={width}, ffn={ffn}, batch {rows} x {tokens}, {answers} answers a row".format(
        **result["shape"]
    )
    columns = ("", "step, alone", "saved, alone", "step, with those above", "saved, with those above")
    return [Table(f"What each trick gives, over a step without any ({size})", columns, rows)]


def _row(row: Result) -> tuple[str, ...]:
    return (row["trick"], *_told(row["alone"]), *_told(row["together"]))


def _told(one: Result) -> tuple[str, str]:
    return show(one["ratio"]), f"{one['saved_ratio']:.2f}"


def plots(result: Result) -> list[Plot]:
    """Return the step and what is saved with each trick and those before it."""
    rows = {row["trick"]: row["together"] for row in result["rows"]}
    return [
        Bars("Step, with those above", {name: one["ratio"]["median"] for name, one in rows.items()}),
        Bars("Saved for backward, with those above", {name: one["saved_ratio"] for name, one in rows.items()}),
    ]


BENCHMARK = Benchmark(
    full=Shape(rounds=11, layers=4, width=768, ffn=2048, heads=12, rows=4, tokens=128, answers=8),
    quick=Shape(rounds=2, layers=1, width=64, ffn=96, heads=2, rows=2, tokens=16, answers=4),
    measure=measure,
    tables=tables,
    plots=plots,
)
