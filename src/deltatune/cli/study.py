"""`deltatune study`: many runs from one plan, their state, and the report about them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from deltatune.study import Plan, Status
    from deltatune.study.worker import Measure

app = typer.Typer(no_args_is_help=True, help="Compare methods: many runs from one plan, then a report.")

FAILED, STOPPED = 1, 130
SHOWN_FAILURES = 20

Folder = Annotated[Path, typer.Argument(help="The study's folder, as given to `study run --out`.", show_default=False)]


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="The plan, a TOML file such as studies/quick.toml.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the runs; by default studies/out/<name of the plan>.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", min=1, help="Processes that work at a time; by default one a core.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try the runs again that failed before.")
    ] = False,
    together: Annotated[
        int,
        typer.Option(min=1, help="Train this many runs in one pass over a backbone; it pays on a GPU, not on a CPU."),
    ] = 1,
) -> None:
    """Do every run of a plan that is not done yet.

    Issue it again after Ctrl-C, a crash or a power cut and it continues; add seeds, tasks or methods to the plan and it
    does the new runs only. Several of these commands on the same folder share the work. Ends with 1 when runs failed.
    """
    from deltatune.study import Plan, run_study

    read = Plan.read(plan)
    folder = out or Path("studies/out") / read.name
    try:
        status = run_study(read, folder, workers, retry_failed, together=together, measure=_measure(read))
    except KeyboardInterrupt:
        typer.secho(
            f"Stopped; nothing is lost. To continue: {_command(plan, out, workers, together)}", fg="yellow", err=True
        )
        raise typer.Exit(STOPPED) from None
    _show(status)
    if not status.complete:
        raise typer.Exit(FAILED)
    typer.echo(f"For the report: deltatune study report {folder}")


@app.command()
def status(folder: Folder) -> None:
    """Show how far a study is, by method; works while it runs."""
    from deltatune.study import status

    _show(status(folder))


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(help="The study's folder, or a results.json that an earlier report wrote.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the report; by default `report` in the study's folder."),
    ] = None,
) -> None:
    """Write the report: report.html (one page, no network needed), report.md, results.csv, results.json, figures.

    It can be written at any time; it says what is still missing.
    """
    from deltatune.study import report

    place = out or (folder if folder.is_dir() else folder.parent) / "report"
    report(folder, place)
    typer.echo(f"Wrote {place / 'report.html'} (and report.md, results.csv, results.json, figures/).")


def _measure(plan: Plan) -> Measure | None:
    """Return the instruments, where a plan asks for some."""
    if not plan.theory:
        return None
    from deltatune.theory.instruments import MEASURE

    return MEASURE


def _command(plan: Path, out: Path | None, workers: int | None, together: int) -> str:
    options = [f"--out {out}" if out else "", f"--workers {workers}" if workers else ""]
    options.append(f"--together {together}" if together > 1 else "")
    return " ".join(["deltatune study run", str(plan), *filter(None, options)])


def _show(status: Status) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_table(status))
    for line in status.failures[:SHOWN_FAILURES]:
        run = line.entry.run
        title = f"{line.entry.method} on {run.task}, {run.backbone}, seed {run.seed}"
        console.print(f"failed: {title}: {line.reason}", style="red", markup=False, soft_wrap=True)
    if len(status.failures) > SHOWN_FAILURES:
        console.print(f"and {len(status.failures) - SHOWN_FAILURES} more failed runs; the report lists them all.")
    if status.failures:
        console.print("To try them again: add --retry-failed to `deltatune study run`.")


def _table(status: Status) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    states = ("done", "running", "failed", "pending")
    table = Table(
        "method", *states, box=box.SIMPLE_HEAD, pad_edge=False, title=escape(f"{status.name} in {status.folder}")
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for method, counts in status.by_method().items():
        table.add_row(escape(method), *(str(counts[state] or "") for state in states))
    table.add_section()
    table.add_row("all", *(str(status.counts[state]) for state in states))
    return table
