"""`deltatune methods`: the taxonomy as a table."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING
from typing import TYPE_CHECKING, Annotated

import typer

from deltatune.errors import DeltaTuneError, nearest

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from deltatune.core.method import Method

GROUPS = ("addition", "specification", "reparameterization")
NAME, YEAR = r"[A-Z][\w'-]+", r"(?:19|20)\d\d"
PAPER = re.compile(rf"(?:{NAME} )*{NAME}(?: et al\.?| and {NAME})?,? (?:\({YEAR}\)|{YEAR})")
Explain = Annotated[
    str | None, typer.Option(metavar="NAME", help="What one method computes, how it starts, and who published it.")
]
On = Annotated[
    str | None, typer.Option(metavar="BACKBONE", help="Count what each method would train here, e.g. pebble.")
]


def methods(explain: Explain = None, on: On = None) -> None:
    """List every delta method: its group, its equation, where it goes by default, and its paper."""
    known = _known()
    if explain is None:
        from rich.console import Console

        Console(highlight=False, markup=False).print(_table(known, on))
    elif explain in known:
        typer.echo(_explanation(explain, known[explain]))
    else:
        raise DeltaTuneError(f"there is no method {explain!r}.{nearest(explain, known)} Known: {', '.join(known)}.")


def _known() -> dict[str, type[Method]]:
    import deltatune.methods  # noqa: F401  (a method is known once it is defined)
    from deltatune.core.method import registry

    known = registry()
    order = (*GROUPS, _group(object))
    return {name: known[name] for name in sorted(known, key=lambda name: (order.index(_group(known[name])), name))}


def _group(method: type) -> str:
    """The folder that the method's file lies in; those beside the groups make methods from methods."""
    folder = method.__module__.split(".")[-2:][0]
    return folder if folder in GROUPS else "combination"


def _default(method: type[Method]) -> Method | None:
    """The method with its default settings; None when it has none, as a combinator without its inner method."""
    from deltatune.core.spec import build

    try:
        return build(method.__name__, {})
    except DeltaTuneError:
        return None


def _table(known: dict[str, type[Method]], backbone: str | None) -> Table:
    from rich import box
    from rich.table import Table

    from deltatune.backbones.load import skeleton

    model = skeleton(backbone) if backbone else None
    columns = ("group", "method", "equation", "default place", "merges", "paper")
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    if backbone:
        table.add_column(f"trained on {backbone}", justify="right")
    for name, method in known.items():
        default = _default(method)
        place, merges = (default.where, "no" if "merge" in default.breaks else "yes") if default else ("-", "-")
        counts = [_count(default, model)] if model is not None else []
        table.add_row(_group(method), name, _equation(method), place, merges, _paper(method), *counts)
    return table


def _count(method: Method | None, model: nn.Module) -> str:
    from deltatune.core.delta import sites

    try:
        table = sites(model, method) if method else None
    except DeltaTuneError:
        table = None
    return f"{table.parameters:,} ({100 * table.parameters / table.backbone_parameters:.3g} %)" if table else "-"


def _about(method: type[Method]) -> str:
    return inspect.getdoc(sys.modules[method.__module__]) or ""


def _equation(method: type[Method]) -> str:
    """The first indented line of the docstring that opens the method's file, without the shapes behind it."""
    lines = [line.strip() for line in _about(method).splitlines() if line.startswith("    ")]
    return re.split(r"\s{3,}", lines[0])[0] if lines else ""


def _paper(method: type[Method]) -> str:
    found = PAPER.search(method.__doc__ or "") or PAPER.search(_about(method))
    return found[0] if found else ""


def _explanation(name: str, method: type[Method]) -> str:
    default = _default(method)
    facts = [f"Settings: {name}({_settings(method)})"]
    if default:
        facts += [f"Default place: {default.where}"]
        facts += [f"Law that it does not keep: {law} ({reason})." for law, reason in default.breaks.items()]
    return "\n\n".join([_about(method), inspect.cleandoc(method.__doc__ or ""), "\n".join(facts)])


def _settings(method: type[Method]) -> str:
    from deltatune.core.spec import fields_of, literal

    return ", ".join(f"{f.name}={'...' if f.default is MISSING else literal(f.default)}" for f in fields_of(method))
