"""`deltatune theory`: the two theories of delta tuning as instruments on what was tuned; one file an instrument."""

from __future__ import annotations

import typer

from deltatune.cli.theory.control import control
from deltatune.cli.theory.gap import gap
from deltatune.cli.theory.intrinsic import intrinsic
from deltatune.cli.theory.landscape import landscape
from deltatune.cli.theory.size import size
from deltatune.cli.theory.spectrum import spectrum

app = typer.Typer(
    no_args_is_help=True,
    help="Measure what was tuned by the two theories of delta tuning: optimization in few dimensions, and optimal control.",
)
for command in (spectrum, gap, landscape, control, size, intrinsic):
    app.command()(command)
