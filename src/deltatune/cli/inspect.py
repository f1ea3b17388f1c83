"""`deltatune inspect`: what a file or folder of weights changes, as a tree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.source import On, backbone, check, read
from deltatune.errors import DeltaTuneError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree
    from torch import nn

    from deltatune.core.contents import Held
    from deltatune.core.weights import Weights

TEXT = "green"


def inspect(
    file: Annotated[
        Path, typer.Argument(help="Folder or file of weights, of deltatune or another library.", show_default=False)
    ],
    on: On = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Show what a delta changes: its methods and places, the sizes and norms of its tensors, the backbone it is for.

    A file of deltatune says all this by itself; with --on it is also checked against a backbone. A folder of another
    library (peft, ...) needs --on, since it does not say what its names mean.

    Example: deltatune inspect runs/topic
    """
    from deltatune.core.contents import contents

    model = backbone(on)
    weights = read(file, model)
    held, fits = contents(weights), None if model is None else _misfit(weights, model) or "yes"
    if as_json:
        typer.echo(json.dumps(_json(file, weights, held, fits), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console(highlight=False).print(_tree(file, weights, held, fits if on is None else f"{fits} ({on})"))


def _misfit(weights: Weights, model: nn.Module) -> str | None:
    """Say why weights do not fit a backbone."""
    try:
        check(weights, model)
    except DeltaTuneError as error:
        return f"no: {error}"
    return None


def _totals(held: list[Held]) -> dict[str, int]:
    entries = [entry for term in held for entry in term.entries]
    return {
        "sites": sum(len([address for address in term.sites if address != "*"]) for term in held),
        "tensors": len(entries),
        "parameters": sum(entry.parameters for entry in entries if entry.trained),
        "bytes": sum(entry.nbytes for entry in entries),
    }


def _json(file: Path, weights: Weights, held: list[Held], fits: str | None) -> dict[str, Any]:
    return {
        "file": str(file),
        "delta": str(weights.delta),
        "backbone": weights.backbone.to_json(),
        "fits": fits,
        "seed": weights.seed,
        "notes": dict(weights.notes),
        "terms": [term.to_json() for term in held],
        **_totals(held),
    }


def _tree(file: Path, weights: Weights, held: list[Held], fits: str | None) -> Tree:
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.tree import Tree

    tree, totals = Tree(f"[bold]{escape(str(file))}[/bold]"), _totals(held)
    own = weights.backbone
    values = f", values {own.values}" if own.values else ", any values"
    about = tree.add(f"backbone  {escape(own.family)}, structure {own.structure}{values}")
    if fits is not None:
        about.add(f"fits  {escape(fits)}")
    tree.add(f"seed  {weights.seed}")
    for name, note in weights.notes.items():
        tree.add(escape(f"{name}  {note}"))
    for index, term in enumerate(held):
        branch = tree.add(f"[{TEXT}]{escape(str(term.term.method))}[/{TEXT}] at {escape(term.term.where)}")
        if term.sites:
            branch.add(_table(term))
        else:
            branch.add(f"no tensors of its own: term {index} follows from the seed")
    size = f"{totals['parameters']:,} trained parameters, {decimal(totals['bytes'])}"
    tree.add(f"total  {totals['sites']} sites, {totals['tensors']} tensors, {size}")
    return tree


def _table(term: Held) -> Table:
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("site", overflow="fold")
    for column in ("leaf", "shape", "bytes", "norm", ""):
        table.add_column(column, justify="right" if column in ("bytes", "norm") else "left", no_wrap=True)
    for address, entries in term.sites.items():
        for row, entry in enumerate(entries):
            site = "" if row else "all sites" if address == "*" else address
            kind = "" if entry.trained else "not trained"
            shape = " x ".join(map(str, entry.shape)) or "1"
            table.add_row(site, entry.leaf, shape, decimal(entry.nbytes), f"{entry.norm:.4g}", kind)
    return table
