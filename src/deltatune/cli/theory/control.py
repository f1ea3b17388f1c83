"""`deltatune theory control`: a tuned backbone as a controlled system, layer by layer."""

from __future__ import annotations

from typing import Annotated

import typer

from deltatune.cli.source import On
from deltatune.cli.theory.ask import AsJson, Batch, Examples, Folder, Out, Seed, Split, Task


def control(
    folder: Folder,
    on: On = None,
    task: Task = None,
    radius: Annotated[float, typer.Option(help="How far a better control is sought, in norms of the controls.")] = 0.1,
    ascents: Annotated[int, typer.Option(min=1, help="Gradient steps of that search.")] = 4,
    probes: Annotated[int, typer.Option(min=1, help="Random directions that the Gramians are seen from.")] = 4,
    examples: Examples = 32,
    batch: Batch = 8,
    seed: Seed = 0,
    split: Split = "train",
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Show each layer's Hamiltonian, violation of Pontryagin's condition, control energy, co-state and controllability.

    It also tells whether the delta controls in an open or a closed loop. Numbers are means over batches.

    Example: deltatune theory control runs/lora --out theory
    """
    from deltatune.cli.theory.show import show
    from deltatune.theory.instruments import control
    from deltatune.theory.subject import Sample, subject

    found = subject([folder], on, task, Sample(examples, batch, seed, split))
    show(control(found, radius, ascents, probes), as_json, out)
