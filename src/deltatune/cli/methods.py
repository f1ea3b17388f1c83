"""`deltatune methods`: the taxonomy as a table, one method explained, or the pages of docs/methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltatune.errors import DeltaTuneError, nearest

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from deltatune.cli.catalogue import Entry

Explain = Annotated[
    str | None, typer.Option(metavar="NAME", help="What one method computes, how it starts, and who published it.")
]
On = Annotated[
    str | None,
    typer.Option(metavar="BACKBONE", help="Where each method goes here, how much it trains, and what it needs."),
]
Docs = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the pages of the documentation here.")]
COUNTED = "pebble"  # the backbone that the documentation counts on


def methods(explain: Explain = None, on: On = None, docs: Docs = None) -> None:
    """List every delta method with its equation and its paper; with --on, where it goes and how much it trains there."""
    from deltatune.cli.catalogue import catalogue

    known = catalogue()
    if explain is not None:
        if explain not in known:
            raise DeltaTuneError(f"there is no method {explain!r}.{nearest(explain, known)} Known: {', '.join(known)}.")
        typer.echo(explanation(known[explain]))
    elif docs is not None:
        from deltatune.backbones.load import skeleton
        from deltatune.cli.method_pages import write

        for path in write(docs, known, skeleton(on or COUNTED), on or COUNTED):
            typer.echo(f"Wrote {path}")
    else:
        _print(known, on)


def explanation(entry: Entry) -> str:
    """Return what there is to know about one method, as text."""
    facts = [
        f"Written: {entry.settings}",
        f"Default place: {entry.place}",
        f"Merges: {entry.merges}",
        f"Routes: {entry.routes}",
    ]
    facts += [f"Law that it does not keep: {law} ({reason})." for law, reason in entry.breaks.items()]
    return "\n\n".join([f"{entry.name} ({entry.group})\n{entry.line}", entry.about, "\n".join(facts)])


def _print(known: dict[str, Entry], on: str | None) -> None:
    from rich.console import Console

    from deltatune.backbones.load import skeleton
    from deltatune.cli.method_pages import TITLES

    model, console = skeleton(on) if on else None, Console(highlight=False, markup=False)
    for group in dict.fromkeys(e.group for e in known.values()):
        own = [e for e in known.values() if e.group == group]
        console.print(f"\n{TITLES.get(group, group.capitalize())}", style="bold")
        console.print(_equations(own) if model is None else _counts(own, model, str(on)))


def _equations(entries: list[Entry]) -> Table:
    table = _table("method", "equation", "paper")
    for e in entries:
        table.add_row(e.name, e.equation, e.paper)
    return table


def _counts(entries: list[Entry], model: nn.Module, backbone: str) -> Table:
    table = _table("method", "default place", "merges", "routes", "needs", "parameters", f"trained on {backbone}")
    for e in entries:
        counted, needed = e.count(model)
        table.add_row(e.name, e.place, e.merges, e.routes, needed, e.formula, counted)
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column == "method", overflow="fold")
    return table
