"""`deltatune merge`: deltas written into a backbone's own weights, as a folder that any library loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.convert import show
from deltatune.cli.source import fitted
from deltatune.errors import DeltaTuneError, nearest

if TYPE_CHECKING:
    from torch import nn

    from deltatune.core.report import Report
    from deltatune.core.weights import Weights

TOLERANCE = 0.05  # bfloat16 has 8 bits of mantissa, which cost a trained delta a percent or so
COMBINE = ("linear", "prune", "ties", "dare")


def _option(help: str, metavar: str | None = None) -> Any:
    return typer.Option(help=help, metavar=metavar, show_default=metavar is None)


Name = Annotated[str, typer.Argument(help="A built-in name (pebble), a folder, or a hub name.", show_default=False)]
Each = Annotated[list[Path], typer.Argument(help="Weights of any format, one or several.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.", show_default=False)]
How = Annotated[str | None, _option(f"How several are combined: {', '.join(COMBINE)}.", "HOW")]
Factor = Annotated[list[float] | None, _option("Factor of each, in their order; by default 1 each.", "FACTOR")]
Density = Annotated[float, _option("Share of the entries that prune, ties and dare keep.")]
Seed = Annotated[int, _option("Decides what dare drops.")]
Dtype = Annotated[str | None, _option("float32, bfloat16 or float16; by default as the backbone is stored.", "DTYPE")]
Untie = Annotated[bool, typer.Option("--untie", help="Give a changed parameter that is shared its own copy.")]
Tolerance = Annotated[float, _option("Largest error that rounding may make, as a share of the change.")]


def merge(
    backbone: Name,
    weights: Each,
    out: Out,
    combine: How = None,
    weight: Factor = None,
    density: Density = 0.2,
    seed: Seed = 0,
    dtype: Dtype = None,
    untie: Untie = False,
    tolerance: Tolerance = TOLERANCE,
) -> None:
    """Write deltas into a backbone's own weights: a model folder that needs no deltatune.

    The error that rounding to the backbone's dtype makes is measured and printed
    for every parameter, and nothing is written above the tolerance.

    Example: deltatune merge pebble runs/topic topic-model

    Example: deltatune merge pebble runs/a runs/b both --combine ties --weight 0.5 --weight 0.5
    """
    from deltatune.backbones.load import load
    from deltatune.backbones.source import stored_dtype
    from deltatune.backbones.write import write_backbone
    from deltatune.core.merge import merge_
    from deltatune.files import new_folder, write_json

    factors = _factors(weights, combine, weight)
    with new_folder(out) as folder:
        kind = dtype or stored_dtype(backbone)
        base = load(backbone, kind)
        each = [fitted(path, base.model) for path in weights]
        what = each[0] if combine is None else _combined(base.model, each, combine, factors, density, seed)
        error = _lost(merge_(base.model, what, untie, tolerance=tolerance).report, kind)
        write_backbone(base, folder, kind)
        deltas = [{"delta": str(w.delta), "weight": factor} for w, factor in zip(each, factors, strict=True)]
        made = {"backbone": backbone, "deltas": deltas, "combine": combine, "error": error}
        write_json(folder / "merged.json", made)
    typer.echo(f"Wrote {out}: {backbone} with {' and '.join(str(w.delta) for w in each)}, in {kind}.")


def _lost(report: Report, dtype: str) -> float:
    """Print what rounding costs and return the largest error; raises `DeltaTuneError` above the tolerance."""
    from deltatune.core.report import refuse

    show(report)
    refuse(report, f"{dtype} cannot hold it; write --dtype float32, keep it attached, or allow more by --tolerance.")
    return report.error


def _factors(weights: Sequence[Path], combine: str | None, given: Sequence[float] | None) -> list[float]:
    """Return one factor for each of the weights; raises `DeltaTuneError` when what is asked for does not fit together."""
    if combine is not None and combine not in COMBINE:
        raise DeltaTuneError(
            f"there is no way to combine called {combine!r}.{nearest(combine, COMBINE)} Ways: {', '.join(COMBINE)}."
        )
    if combine is None and (len(weights) > 1 or given):
        raise DeltaTuneError(f"say how they are combined: write --combine and one of {', '.join(COMBINE)}.")
    if given and len(given) != len(weights):
        raise DeltaTuneError(
            f"there are {len(weights)} weights and {len(given)} factors; write --weight once for each."
        )
    return list(given or [1.0] * len(weights))


def _combined(
    model: nn.Module,
    weights: Sequence[Weights],
    how: str,
    factors: Sequence[float],
    density: float,
    seed: int,
) -> Weights:
    from deltatune.core.task_vectors import dare, magnitude_prune, task_arithmetic, ties

    match how:
        case "prune":
            return magnitude_prune(model, weights, factors, density)[0]
        case "ties":
            return ties(model, weights, factors, density)[0]
        case "dare":
            return dare(model, weights, factors, density, seed)[0]
    return task_arithmetic(model, weights, factors)[0]
