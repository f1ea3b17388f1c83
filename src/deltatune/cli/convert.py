"""`deltatune convert`: weights from one library's format into another's, or any mergeable delta into a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltatune.cli.source import On, fitted, needed
from deltatune.errors import DeltaTuneError, nearest

if TYPE_CHECKING:
    from deltatune.core.report import Report

TOLERANCE = 1e-3  # that of core.convert, which loads torch


def _list(wanted: bool) -> None:
    if wanted:
        from deltatune import formats

        for name, about in formats.known().items():
            typer.echo(f"{name}: {about}")
        raise typer.Exit


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Weights of any format.", show_default=False)],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write; it must not exist yet.", show_default=False)
    ],
    on: On = None,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="Format to write; --formats lists them.")] = "deltatune",
    lora: Annotated[
        int | None,
        typer.Option(min=1, metavar="RANK", help="Write what it does to the weights as a LoRA of this rank."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest error of such a LoRA, as a share of the change.")
    ] = TOLERANCE,
    formats: Annotated[
        bool, typer.Option("--formats", callback=_list, is_eager=True, help="List the formats and stop.")
    ] = False,
) -> None:
    """Write weights in another library's format, or as a LoRA.

    With --lora the error of every parameter is measured and printed, and nothing is written above the tolerance. Any
    method that can be merged into weights can be converted so.

    Example: deltatune convert runs/topic topic-peft --to peft --on pebble
    """
    from deltatune import formats as library
    from deltatune.core.convert import to_lora
    from deltatune.files import new_folder

    known = library.known()
    if to not in known:
        raise DeltaTuneError(f"there is no format {to!r}.{nearest(to, known)} Known are {', '.join(known)}.")
    with new_folder(target) as folder:
        model = needed(on, f"{source} is checked against its backbone while it is converted")
        weights = fitted(source, model)
        if lora is not None:
            weights, report = to_lora(model, weights, lora, tolerance)
            show(report)
        library.write(to, model, weights, folder)
    typer.echo(f"Wrote {target} as {to}: {weights.delta}, {weights.count:,} parameters.")


def show(report: Report) -> None:
    """Print the measured error of every parameter."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameter", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    for name, error in report.errors.items():
        table.add_row(name, f"{error:.2e}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(
        f"Largest error {report.error:.2e} of the change, at {report.worst or 'none'}; tolerance {report.tolerance:g}."
    )
