"""`deltatune theory landscape`: the loss around a delta's weights, and how sharply it curves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli.source import On
from deltatune.cli.theory.ask import AsJson, Batch, Examples, Folder, Out, Seed, Split, Task


def landscape(
    folder: Folder,
    second: Annotated[
        Path | None, typer.Argument(help="Another delta; the loss on the way to it is shown too.", show_default=False)
    ] = None,
    on: On = None,
    task: Task = None,
    radius: Annotated[float, typer.Option(help="How far to go, in norms of the leaves' rows.")] = 1.0,
    points: Annotated[int, typer.Option(min=2, help="Points along each of the two directions.")] = 9,
    eigenvalues: Annotated[int, typer.Option(min=1, help="How many of the Hessian's largest eigenvalues.")] = 5,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Lanczos steps; by default 20 more than eigenvalues.", show_default=False)
    ] = None,
    examples: Examples = 32,
    batch: Batch = 16,
    seed: Seed = 0,
    split: Split = "train",
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Show a slice of the loss around a delta's weights and the largest eigenvalues of its Hessian.

    Example: deltatune theory landscape runs/lora runs/full --out theory
    """
    from deltatune.cli.theory.show import show
    from deltatune.theory.instruments import landscape
    from deltatune.theory.subject import Sample, subject

    folders = [folder, *([second] if second else [])]
    found = subject(folders, on, task, Sample(examples, batch, seed, split))
    show(landscape(found, radius, points, eigenvalues, steps), as_json, out)
