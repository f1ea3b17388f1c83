"""`deltatune theory gap`: how differently two tuned models answer and represent a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli.source import On
from deltatune.cli.theory.ask import AsJson, Batch, Examples, Folder, Out, Seed, Split, Task


def gap(
    reference: Folder,
    delta: Annotated[
        Path | None,
        typer.Argument(
            help="What is compared with it; without one, it is compared with the backbone.", show_default=False
        ),
    ] = None,
    on: On = None,
    task: Task = None,
    where: Annotated[
        str | None,
        typer.Option(help="Where hidden states are compared; by default behind every block.", show_default=False),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Points on the way between the weights.")] = 11,
    examples: Examples = 64,
    batch: Batch = 16,
    seed: Seed = 0,
    split: Split = "dev",
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Show the gap in function space: KL divergence and squared difference of scores, and CKA of the hidden states by layer.

    Where both change weights it also checks gap <= L |eps| on the way between them.

    Example: deltatune theory gap runs/full runs/lora --out theory
    """
    from deltatune.cli.theory.show import show
    from deltatune.theory.instruments import gap
    from deltatune.theory.subject import Sample, subject

    folders = [reference, *([delta] if delta else [])]
    show(gap(subject(folders, on, task, Sample(examples, batch, seed, split)), where, points), as_json, out)
