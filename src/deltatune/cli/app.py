"""The command `deltatune`: its sub-commands, and the one place where errors become messages."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deltatune.cli import study, theory
from deltatune.cli.convert import convert
from deltatune.cli.diff import diff
from deltatune.cli.evaluate import evaluate
from deltatune.cli.inspect import inspect
from deltatune.cli.merge import merge
from deltatune.cli.methods import methods
from deltatune.cli.place import place
from deltatune.cli.plan import plan
from deltatune.cli.predict import predict
from deltatune.cli.pretrain import pretrain
from deltatune.cli.sites import sites
from deltatune.cli.tune import tune
from deltatune.errors import DeltaTuneError
from deltatune.quiet import quiet

DEBUG = "DELTATUNE_DEBUG"
MISTAKE, BUG, INTERRUPTED = 2, 1, 130


class Shell(TyperGroup):
    """The root command, which stops at Ctrl-C with one line."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Stopped.", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Shell,
    help="Adapt pre-trained language models by changing almost nothing in them.",
    epilog="Start with: deltatune methods, deltatune sites pebble --delta 'LoRA(rank=8)'",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"deltatune {version('deltatune')}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help=f"Show tracebacks; {DEBUG}=1 does the same.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


LOOK, RUN, TURN, MAKE = (
    "Look around",
    "One run, many runs",
    "Measure, compare and change what was tuned",
    "Make a backbone",
)
app.command("methods", rich_help_panel=LOOK)(methods)
app.command("sites", rich_help_panel=LOOK)(sites)
app.command("inspect", rich_help_panel=LOOK)(inspect)
app.command("place", rich_help_panel=LOOK)(place)
app.command("plan", rich_help_panel=LOOK)(plan)
app.command("tune", rich_help_panel=RUN)(tune)
app.command("eval", rich_help_panel=RUN)(evaluate)
app.command("predict", rich_help_panel=RUN)(predict)
app.add_typer(study.app, name="study", rich_help_panel=RUN)
app.add_typer(theory.app, name="theory", rich_help_panel=TURN)
app.command("convert", rich_help_panel=TURN)(convert)
app.command("merge", rich_help_panel=TURN)(merge)
app.command("diff", rich_help_panel=TURN)(diff)
app.command("pretrain", rich_help_panel=MAKE)(pretrain)


def main() -> None:
    """Run the command line: 0 done, 1 a bug in deltatune, 2 a mistake in what was asked, 130 stopped by Ctrl-C."""
    quiet()
    try:
        app(prog_name="deltatune")
    except DeltaTuneError as error:
        _leave(f"Error: {error}", MISTAKE, error)
    except Exception as error:
        _leave(f"A bug in deltatune: {type(error).__name__}: {error}\n--debug shows the traceback.", BUG, error)


def _leave(message: str, code: int, error: Exception) -> None:
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        raise error
    typer.secho(message, fg="red", err=True)
    sys.exit(code)
