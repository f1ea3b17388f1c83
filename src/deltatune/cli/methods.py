"""`deltatune methods`: the taxonomy as a table, one method explained, or the pages of docs/methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltatune.errors import DeltaTuneError, nearest

if TYPE_CHECKING:
    from rich.table import Table

    from deltatune.cli.catalogue import Entry

Explain = Annotated[
    str | None, typer.Option(metavar="NAME", help="What one method computes, how it starts, and who published it.")
]
On = Annotated[
    str, typer.Option(metavar="BACKBONE", help="Count what each method would train here, and list what it needs.")
]
Docs = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the pages of the documentation here.")]


def methods(explain: Explain = None, on: On = "pebble", docs: Docs = None) -> None:
    """List every delta method: its group, its equation, where it goes by default, what it trains, and its paper."""
    from deltatune.cli.catalogue import catalogue

    known = catalogue()
    if explain is not None:
        if explain not in known:
            raise DeltaTuneError(f"there is no method {explain!r}.{nearest(explain, known)} Known: {', '.join(known)}.")
        typer.echo(_explanation(known[explain]))
        return
    from deltatune.backbones.load import skeleton

    if docs is not None:
        from deltatune.cli.method_pages import write

        for path in write(docs, known, skeleton(on), on):
            typer.echo(f"Wrote {path}")
        return
    from rich.console import Console

    Console(highlight=False, markup=False).print(_table(known, on))


def _table(known: dict[str, Entry], backbone: str) -> Table:
    from rich import box
    from rich.table import Table

    from deltatune.backbones.load import skeleton

    model = skeleton(backbone)
    columns = ("group", "method", "equation", "default place", "merges", "needs", "paper", "parameters")
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"trained on {backbone}", justify="right")
    for e in known.values():
        found = e.count(model)
        counted = f"{found[0]:,} ({found[1]:.3g} %)" if found else "-"
        needed = ", ".join(sorted(found[2])) if found else ""
        merges = "yes" if e.merges else "no"
        table.add_row(e.group, e.name, e.equation, e.place, merges, needed, e.paper, e.formula, counted)
    return table


def _explanation(entry: Entry) -> str:
    facts = [f"Settings: {entry.name}({entry.settings})", f"Default place: {entry.place}"]
    if entry.default:
        facts += [f"Law that it does not keep: {law} ({reason})." for law, reason in entry.default.breaks.items()]
    return "\n\n".join([entry.about, entry.line, "\n".join(facts)])
