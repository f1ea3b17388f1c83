"""`deltatune sites`: the dry run of a delta on a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from deltatune.core.delta import SiteTable


def sites(
    backbone: Annotated[
        str, typer.Argument(help="A built-in name (pebble), a folder, or a hub name.", show_default=False)
    ],
    delta: Annotated[
        str, typer.Option(help="Methods with their places, e.g. 'LoRA(rank=8).at(\"attn.{q,v}\") + BitFit()'.")
    ] = "LoRA(rank=8)",
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the backbone as a tree with the delta in it: a page that works offline."
        ),
    ] = None,
) -> None:
    """Show where a delta would act and how many parameters it would train, without loading any weight.

    Example: deltatune sites pebble --delta 'LoRA(rank=8) + BitFit()' --html sites.html
    """
    from rich.console import Console

    import deltatune.methods  # noqa: F401  (a method is known once it is defined)
    from deltatune.backbones.load import skeleton
    from deltatune.core.delta import parse
    from deltatune.core.delta import sites as dry_run

    written, model = parse(delta), skeleton(backbone)
    table = dry_run(model, written)
    if html is not None:
        _write(html, backbone, model, table)
        return
    console = Console(highlight=False, markup=False)
    console.print(_table(table))
    console.print(
        f"{written}: {len(table.placements)} sites, {table.parameters:,} trained parameters, "
        f"{_percent(table.parameters, table)} % of the {table.backbone_parameters:,} in the backbone",
        soft_wrap=True,
    )


def _write(path: Path, backbone: str, model: nn.Module, table: SiteTable) -> None:
    from deltatune.backbones.source import config_dtype
    from deltatune.cli.structure import page
    from deltatune.files import write_text

    write_text(path, page(backbone, model, table, config_dtype(backbone)))
    typer.echo(f"Wrote {path}: {len(table.placements)} sites, {table.parameters:,} trained parameters.")


def _table(found: SiteTable) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("path", "role", "method", "leaves", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("parameters", justify="right")
    table.add_column("% of backbone", justify="right")
    for path, role, method, leaves, parameters in found.rows():
        table.add_row(path, role, method, leaves, f"{parameters:,}", _percent(parameters, found))
    return table


def _percent(parameters: int, found: SiteTable) -> str:
    return f"{100 * parameters / max(found.backbone_parameters, 1):.3g}"
