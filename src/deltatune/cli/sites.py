"""`deltatune sites`: the dry run of a delta on a backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from deltatune.core.delta import SiteTable


def sites(
    backbone: Annotated[
        str, typer.Argument(help="A built-in name (pebble), a folder, or a hub name.", show_default=False)
    ],
    delta: Annotated[
        str, typer.Option(help="Methods with their places, e.g. 'LoRA(rank=8).at(\"attn.{q,v}\") + BitFit()'.")
    ] = "LoRA(rank=8)",
) -> None:
    """Show where a delta would act and how many parameters it would train, without loading any weight."""
    from rich.console import Console

    import deltatune.methods  # noqa: F401  (a method is known once it is defined)
    from deltatune.backbones.load import skeleton
    from deltatune.core.delta import parse
    from deltatune.core.delta import sites as dry_run

    written = parse(delta)
    table = dry_run(skeleton(backbone), written)
    console = Console(highlight=False, markup=False)
    console.print(_table(table))
    console.print(
        f"{written}: {len(table.placements)} sites, {table.parameters:,} trained parameters, "
        f"{_percent(table.parameters, table)} % of the {table.backbone_parameters:,} in the backbone",
        soft_wrap=True,
    )


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
