"""`deltatune theory size`: how small a delta may be for a task, estimated from one short training."""

from __future__ import annotations

from typing import Annotated

import typer

from deltatune.cli.source import On
from deltatune.cli.theory.ask import AsJson, Batch, Examples, Folder, Out, Seed, Split, Task


def size(
    folder: Folder,
    on: On = None,
    task: Task = None,
    share: Annotated[float, typer.Option(help="How much of the squared change is to be kept.")] = 0.9,
    where: Annotated[str, typer.Option(help="Where a bottleneck would stand.")] = "ffn.down",
    examples: Examples = 64,
    batch: Batch = 16,
    seed: Seed = 0,
    split: Split = "train",
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Estimate the smallest rank and bottleneck from what Full(), or a LoRA of high rank, learned in a few hundred steps.

    Example: deltatune theory size runs/full --share 0.9
    """
    from deltatune.cli.theory.show import show
    from deltatune.theory.instruments import size
    from deltatune.theory.subject import Sample, subject

    show(size(subject([folder], on, task, Sample(examples, batch, seed, split)), share, where), as_json, out)
