"""`deltatune diff`: how far two deltas are apart, module by module."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.source import On, backbone, check, read

if TYPE_CHECKING:
    from deltatune.core.compare import Comparison, Distance

BY = {"changes": "what they do to the weights", "leaves": "their own numbers; name a backbone by --on for their effect"}


def diff(
    a: Annotated[Path, typer.Argument(help="Weights of any format.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Weights for the same backbone.", show_default=False)],
    on: On = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON, all angles included.")] = False,
) -> None:
    """Compare two deltas: the distance of their changes, and the angles between what these span.

    LoRAs, of any ranks, and deltas of one method need no backbone; unlike deltas
    are compared by what they do to the weights of the backbone named by --on.

    relative: distance over the larger norm. cosine: 1 same direction, 0 unrelated.
    out, in: smallest and largest angle in degrees between the spaces in which a
    module's outputs move, and those that it reads; 0 same space, 90 unrelated.

    Example: deltatune diff runs/topic runs/sentiment
    """
    from deltatune.core.compare import compare

    model = backbone(on)
    each = [read(path, model) for path in (a, b)]
    if model is not None:
        for weights in each:
            check(weights, model)
    found = compare(each[0], each[1], model)
    if as_json:
        typer.echo(json.dumps(_json(a, b, found), indent=2))
        return
    _print(a, b, found)


def _json(a: Path, b: Path, found: Comparison) -> dict[str, Any]:
    modules = {name: _numbers(distance) for name, distance in found.modules.items()}
    return {"a": str(a), "b": str(b), "by": found.by, "total": _numbers(found.total), "modules": modules}


def _numbers(distance: Distance) -> dict[str, Any]:
    return {**vars(distance), "relative": distance.relative, "cosine": distance.cosine}


def _print(a: Path, b: Path, found: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("module" if found.by == "changes" else "leaf", overflow="fold")
    for column in ("distance", "relative", "cosine", "ranks", "out", "in"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, distance in found.modules.items():
        table.add_row(name, *_cells(distance))
    table.add_section()
    table.add_row("all", *_cells(found.total))
    console.print(f"a = {a}, b = {b}, compared by {BY[found.by]}")
    console.print(table)


def _cells(distance: Distance) -> list[str]:
    cosine = "" if distance.cosine is None else f"{distance.cosine:.3f}"
    ranks = "" if distance.ranks is None else "{} {}".format(*distance.ranks)
    angles = [_range(distance.outputs), _range(distance.inputs)]
    return [f"{distance.distance:.3g}", f"{distance.relative:.3f}", cosine, ranks, *angles]


def _range(angles: tuple[float, ...]) -> str:
    return f"{math.degrees(angles[0]):.0f}-{math.degrees(angles[-1]):.0f}" if angles else ""
