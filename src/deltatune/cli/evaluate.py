"""`deltatune eval`: the score of a tuned delta, or of a bare backbone, on a split of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from deltatune.errors import DeltaTuneError, nearest

SPLITS = ("train", "dev", "test")


def evaluate(
    weights: Annotated[
        Path | None,
        typer.Argument(help="Folder that tune wrote; without one the bare backbone answers.", show_default=False),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="The frozen model; by default the one the delta was tuned on.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="What to answer; by default what the delta was tuned for.")] = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    limit: Annotated[int, typer.Option(min=0, help="Only the first examples; 0 takes all.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write id, prediction and target as JSON lines here.")
    ] = None,
) -> None:
    """Measure a tuned delta, or a bare backbone, on a task."""
    if split not in SPLITS:
        raise DeltaTuneError(f"there is no split {split!r}; write train, dev or test.{nearest(split, SPLITS)}")
    from deltatune.tuning import evaluate

    found = evaluate(backbone, task, weights, cast(Literal["train", "dev", "test"], split), limit, out)
    beside = "" if found["majority"] is None else f" (always the commonest label: {found['majority']:.1f})"
    typer.echo(
        f"{found['metric']} {found['score']:.1f}{beside} on {found['examples']} {found['split']} examples of "
        f"{found['task']}, {found['backbone']} with {weights or 'no delta'}"
    )
    if out is not None:
        typer.echo(f"Wrote {out}.")
