"""What a ledger is asked: the longest batch and evaluation of a run, and what its process holds before the first step."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from deltatune.backbones.load import Kind, skeleton
from deltatune.core.delta import Delta
from deltatune.core.products import few_rows, products
from deltatune.core.site import anatomy
from deltatune.tuning.budget import within
from deltatune.tuning.encode import IGNORED, Ids, Row, batches, sizes_of
from deltatune.tuning.ledger import Evaluate, Ledger, Shape, ledger
from deltatune.tuning.memory import in_use
from deltatune.tuning.precision import computes_in
from deltatune.tuning.prices import prices
from deltatune.tuning.recipe import Recipe
from deltatune.tuning.score import SCORERS
from deltatune.tuning.widths import Widths, wide

SMALL = 64


def resident(device: torch.device) -> int:
    """Return the bytes that the process holds, after a small step has brought in what libraries load when they are used."""
    with torch.random.fork_rng(devices=[]), products(device):
        _step(device)
    gc.collect()
    return in_use(device)


def _step(device: torch.device) -> None:
    """Train a small block for a step, and multiply matrices as large as a block's."""
    model = nn.TransformerEncoderLayer(SMALL, 4, SMALL, batch_first=True, device=device)
    table = nn.Embedding(SMALL, SMALL, device=device)
    optimizer = torch.optim.AdamW([*model.parameters(), *table.parameters()], fused=False)
    hidden = model(table(torch.arange(SMALL, device=device).repeat(8, 8)))
    hidden = nn.functional.silu(nn.functional.gelu(hidden))
    (hidden @ table.weight.T).softmax(-1).log().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    wide = torch.ones(512, 1024, device=device)
    torch.mm(wide, wide.T)


def longest(rows: Sequence[Row], recipe: Recipe, seed: int, widths: Widths) -> tuple[Shape, frozenset[int]]:
    """Return the shape of the largest batch that a run will train on, and the steps on batches that `widths` make as wide."""
    order = islice(batches(sizes_of(rows), recipe.batch, seed), recipe.steps)
    shapes = [_shape([rows[index] for index in batch]) for batch in order]
    largest = max(shapes, key=lambda shape: shape.rows * (shape.length + shape.answer))

    def filled(shape: Shape) -> tuple[int, int, int]:
        return shape.rows, wide(shape.length, widths.inputs), wide(shape.answer, widths.labels)

    most = filled(largest)
    alike = (step for step, shape in enumerate(shapes, 1) if filled(shape) == most)
    return replace(largest, widths=max(len(widths.inputs), 1)), frozenset(alike)


def scoring(kind: str, questions: Sequence[Sequence[Row]], recipe: Recipe, pad: int) -> Evaluate:
    """Return the evaluation of the batch of questions with the longest rows, scored as `score_candidates` does."""
    group = sorted(questions, key=lambda rows: max(len(row.input) for row in rows))[-recipe.eval_batch :]

    def read(model: Any) -> object:
        with torch.no_grad():
            return list(SCORERS[kind](model, group, pad))

    return read


def writing(kind: str, prompts: Sequence[Ids], recipe: Recipe, answer: int) -> Evaluate:
    """Return the evaluation of the longest batch of prompts: one pass, with a cache as long as the answers make it."""
    group = sorted(prompts, key=len)[-recipe.eval_batch :]
    rows, length = len(group), len(group[-1])

    def read(model: Any) -> object:
        like = {"dtype": torch.long, "device": next(model.parameters()).device}
        with few_rows():
            if kind == "seq2seq":
                options = {"decoder_input_ids": torch.zeros(rows, answer, **like)}
                return model(input_ids=torch.zeros(rows, length, **like), use_cache=True, **options)
            return model(input_ids=torch.zeros(rows, length + answer, **like), use_cache=True, logits_to_keep=1)

    return torch.no_grad()(read)


def made_up(model: nn.Module, shape: Shape, recipe: Recipe, candidates: int) -> Evaluate:
    """Return the scoring of made-up questions of a shape, each with some candidates."""
    kind, answer = kind_of(model), (1,) * max(shape.answer, 1)
    length = shape.length if kind == "seq2seq" else max(shape.length - len(answer), 1)
    asked = [(index, *(1,) * (length - 1)) for index in range(recipe.eval_batch)]
    whole = kind == "seq2seq"
    rows = [Row(ids, answer) if whole else Row(ids + answer, (IGNORED,) * length + answer) for ids in asked]
    return scoring(kind, [[row] * candidates for row in rows], recipe, 0)


def kind_of(model: Any) -> Kind:
    """Return how a backbone answers, as its structure says."""
    if model.config.is_encoder_decoder:
        return "seq2seq"
    return "causal" if all(stack.causal for stack in anatomy(model).stacks) else "masked"


def _shape(batch: Sequence[Row]) -> Shape:
    inputs = [len(row.input) for row in batch]
    return Shape(
        len(batch),
        max(inputs),
        max(len(row.labels) - row.labels.count(IGNORED) for row in batch),
        min(inputs) < max(inputs),
    )


def planned(name: str, delta: Delta, shape: Shape, recipe: Recipe, candidates: int = 0, budget: int = 0) -> Ledger:
    """Return the ledger of training a delta on a backbone by name, in a process like this one, under a memory budget.

    `candidates` is how many answers an evaluation chooses from; 0 plans no evaluation. 0 sets no budget.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, held = skeleton(name), resident(device)
    evaluate = made_up(model, shape, recipe, candidates) if candidates else None
    priced = prices(device, computes_in(recipe.precision))

    def tried(paths: Sequence[str]) -> Ledger:
        return replace(ledger(model, delta, shape, recipe, evaluate, paths, priced.seconds, device), process=held)

    return within(budget, tried)
