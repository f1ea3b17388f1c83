"""`deltatune plan`: what training a delta would take, in memory and in time, without loading a weight."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.tuning.recipe import OPTIMIZERS, PRECISIONS, Recipe

if TYPE_CHECKING:
    from deltatune.tuning.ledger import Ledger

WORDS = {
    "process": "process: interpreter, libraries",
    "backbone": "backbone",
    "delta": "delta",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations kept for the backward pass",
    "logits": "logits",
    "cache": "cache of keys and values",
    "workspace": "workspace: temporaries at the peak",
    "kernels": "kernels: products compiled for their shapes",
}


def plan(
    backbone: Annotated[
        str, typer.Argument(help="A built-in name (pebble), a folder, or a hub name.", show_default=False)
    ],
    delta: Annotated[
        str, typer.Option(help="Methods with their places, e.g. 'LoRA(rank=8).at(\"attn.{q,v}\") + BitFit()'.")
    ] = "LoRA(rank=8)",
    batch: Annotated[int, typer.Option(help="Examples in a batch.")] = Recipe.batch,
    length: Annotated[int, typer.Option(help="Tokens of the longest input; on a decoder its answer included.")] = 128,
    answer: Annotated[int, typer.Option(help="Tokens of the longest answer.")] = 8,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = Recipe.optimizer,
    precision: Annotated[str, typer.Option(help=f"What to compute in: {', '.join(PRECISIONS)}.")] = Recipe.precision,
    eval_batch: Annotated[
        int, typer.Option(help="Examples in a batch of an evaluation; 0 plans none.")
    ] = Recipe.eval_batch,
    candidates: Annotated[int, typer.Option(help="Answers that an evaluation chooses from.")] = 2,
    memory_budget: Annotated[str, typer.Option(help="Most memory to use, such as 2GB; 0 sets no limit.")] = "0",
    as_json: Annotated[bool, typer.Option("--json", help="Print the ledger as JSON.")] = False,
) -> None:
    """Show the peak memory of training by component and the time of a step, before running anything.

    Example: deltatune plan pebble --delta 'LoRA(rank=8)' --batch 16 --length 256 --memory-budget 1GB
    """
    recipe = Recipe(batch=batch, optimizer=optimizer, precision=precision, eval_batch=max(eval_batch, 1))
    from deltatune.core.delta import parse
    from deltatune.tuning.forecast import planned
    from deltatune.tuning.ledger import Shape
    from deltatune.tuning.memory import size

    shape, budget = Shape(batch, length, answer), size(memory_budget)
    import deltatune.methods  # noqa: F401  (a method is known once it is defined)

    found = planned(backbone, parse(delta), shape, recipe, candidates if eval_batch else 0, budget)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        _show(found, f"{parse(delta)} on {backbone}, batches of {batch} x {length}")


def _show(found: Ledger, title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("at the peak", box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("MiB", justify="right")
    values: dict[str, Any] = found.to_json()
    for name, words in WORDS.items():
        if values[name]:
            table.add_row(words, f"{values[name] / 2**20:,.1f}")
    table.add_section()
    table.add_row(f"peak, in {found.peak_in}", f"{found.peak / 2**20:,.1f}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    if found.recomputed:
        console.print(f"recomputed in the backward pass: {', '.join(found.recomputed)}", soft_wrap=True)
    if found.seconds is not None:
        console.print(f"a step: about {found.seconds:.3g} s, by its operations on this machine", soft_wrap=True)
