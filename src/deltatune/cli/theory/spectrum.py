"""`deltatune theory spectrum`: how many directions a delta's change of the weights has, and what families of deltas lose of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltatune.cli.source import On
from deltatune.cli.theory.ask import FOLDER, AsJson, Out


def spectrum(
    folders: Annotated[list[Path], typer.Argument(help=FOLDER, show_default=False)],
    on: On = None,
    family: Annotated[
        list[str] | None,
        typer.Option(help="A delta whose residual of the first folder's change is wanted; several times for several."),
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Show the singular values and the effective rank of the change of every matrix, by layer and role.

    Of full fine-tuning it also shows what some families of deltas cannot express of the change, the residual |eps|.

    Example: deltatune theory spectrum runs/full --family 'LoRA(rank=4)' --family 'BitFit()'
    """
    from deltatune.cli.theory.show import show
    from deltatune.theory.instruments import spectrum
    from deltatune.theory.subject import subject

    show(spectrum(subject(folders, on), family or ()), as_json, out)
