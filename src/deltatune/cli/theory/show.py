"""What all instruments answer with: tables and one sentence, or JSON, and a page with plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from deltatune.theory.exhibit import Exhibit

SHOWN = 40  # rows of a table on the terminal


def show(found: Exhibit, as_json: bool, out: Path | None) -> None:
    """Print what an instrument found, and write `<instrument>.json` and `<instrument>.html` where a folder is given."""
    value = found.to_json()
    if out is not None:
        _write(value, out)
    if as_json:
        typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
        return
    _print(value)
    if out is not None:
        typer.echo(f"Wrote {out / value['instrument']}.html and .json.")


def _write(value: dict[str, Any], out: Path) -> None:
    from deltatune.files import write_text

    page = html(value)  # made before anything is written
    write_text(out / f"{value['instrument']}.json", json.dumps(value, ensure_ascii=False) + "\n")
    write_text(out / f"{value['instrument']}.html", page)


def html(value: dict[str, Any]) -> str:
    """Return the page of an exhibit: styles and figures inside, no reference to anything outside."""
    from importlib.resources import files

    from deltatune.study.charts import pictures
    from deltatune.study.page import environment

    made = environment(True, Path(str(files("deltatune") / "cli" / "templates")))
    made.filters["cell"] = cell
    return made.get_template("theory.html.j2").render(
        found=value, pictures=pictures(value["charts"], value["instrument"])
    )


def cell(value: Any) -> str:
    """Return a cell of a table as text: numbers short, whole ones in full."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 and abs(value) < 1e7 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print(value: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for each in value["tables"]:
        console.print(each["title"])
        console.print(_table(each))
        if len(each["rows"]) > SHOWN:
            console.print(f"{len(each['rows']) - SHOWN} more rows are in --json and --out.")
    for line in (*value["notes"], value["finding"]):
        console.print(line, soft_wrap=True)


def _table(value: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(value["columns"]):
        words = any(isinstance(row[index], str) for row in value["rows"])
        table.add_column(name, justify="left" if words else "right")
    for row in value["rows"][:SHOWN]:
        table.add_row(*map(cell, row))
    return table
