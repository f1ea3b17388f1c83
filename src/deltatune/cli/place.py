"""`deltatune place`: where a method should act on a task, under a budget of parameters."""

from __future__ import annotations

import json
from typing import Annotated

import typer

SHOWN = 12  # candidates in the table, from the top


def place(
    backbone: Annotated[
        str, typer.Argument(help="A built-in name (pebble), a folder, or a hub name.", show_default=False)
    ],
    task: Annotated[str, typer.Argument(help="A built-in name, a folder, or a hub name.", show_default=False)],
    budget: Annotated[int, typer.Option(help="Trained parameters that the delta may have.", show_default=False)],
    candidates: Annotated[
        str, typer.Option(help="What may act, and where: every site that it finds is weighed.")
    ] = "LoRA(rank=8).at('{attn.{q,k,v,o},cross.{q,k,v,o}?,ffn.{gate?,up,down}}')",
    examples: Annotated[int, typer.Option(help="Training examples that are looked at.", min=1)] = 64,
    batch: Annotated[int, typer.Option(help="Examples in a batch.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the examples and of the fresh weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the sites whose parameters have most authority over a task's loss, and print them as a delta for tune.

    Example: deltatune place pebble topic --budget 20000
    """
    import deltatune as dt
    from deltatune.backbones import load
    from deltatune.theory.placement import place_by_control
    from deltatune.theory.subject import Sample
    from deltatune.tuning.recipe import Recipe

    delta, loaded = dt.parse(candidates), load(backbone)
    batches = Sample(examples, batch, seed).batches(loaded, task, Recipe())
    found = place_by_control(loaded.model, delta, batches, budget, seed)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    _show(found.authority)
    typer.echo(f"{found.finding}\n{found.delta}")


def _show(authority: dict[str, float]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("candidate", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("authority", justify="right")
    for name, value in sorted(authority.items(), key=lambda item: -item[1])[:SHOWN]:
        table.add_row(name, f"{value:.3g}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    if len(authority) > SHOWN:
        console.print(f"{len(authority) - SHOWN} more candidates have less.")
