"""`deltatune theory intrinsic`: the fewest dimensions in which a task can be learned, by a sweep of ordinary runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli.source import On
from deltatune.cli.theory.ask import AsJson, Task
from deltatune.errors import DeltaTuneError
from deltatune.tuning.recipe import Recipe

if TYPE_CHECKING:
    from deltatune.core.delta import Delta
    from deltatune.tuning import Run

RECIPE = "How to train; by default as the folder's run did"
Steps = Annotated[int | None, typer.Option(help="How many batches to train on.", rich_help_panel=RECIPE)]
Size = Annotated[int | None, typer.Option(help="Examples in a batch.", rich_help_panel=RECIPE)]
Rate = Annotated[float | None, typer.Option(help="Learning rate of full fine-tuning.", rich_help_panel=RECIPE)]
Other = Annotated[float | None, typer.Option(help="Learning rate in the subspaces.", rich_help_panel=RECIPE)]
Every = Annotated[int | None, typer.Option(help="Steps between dev evaluations.", rich_help_panel=RECIPE)]
Limit = Annotated[int | None, typer.Option(help="Dev examples; 0 takes all.", rich_help_panel=RECIPE)]
Input = Annotated[int | None, typer.Option(help="Tokens of a prompt.", rich_help_panel=RECIPE)]


def intrinsic(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A run of Full() that tune or a study wrote; else --on and --task.", show_default=False),
    ] = None,
    on: On = None,
    task: Task = None,
    dims: Annotated[str, typer.Option(help="Dimensions to try, ascending.")] = "10,30,100,300,1000",
    seeds: Annotated[str, typer.Option(help="Seeds of full fine-tuning and of the subspaces.")] = "0,1,2",
    family: Annotated[str, typer.Option(help="The delta of {d} dimensions, such as DID(dim={d}).")] = "SAID(dim={d})",
    share: Annotated[float, typer.Option(help="The share of full fine-tuning's dev score to reach.")] = 0.9,
    steps: Steps = None,
    batch: Size = None,
    lr: Rate = None,
    subspace_lr: Other = None,
    eval_every: Every = None,
    dev_limit: Limit = None,
    max_input: Input = None,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the runs and the result; by default in runs/.")
    ] = None,
) -> None:
    """Find the intrinsic dimension d_90: train in more and more random dimensions until full fine-tuning's score is near.

    Stop it in any way; the same command goes on where it was.

    Example: deltatune theory intrinsic --on pebble --task topic --dims 10,100,1000 --lr 3e-4 --subspace-lr 1e-2
    """
    given = {
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "eval_every": eval_every,
        "dev_limit": dev_limit,
        "max_input": max_input,
    }
    run = _run(folder, on, task, {name: value for name, value in given.items() if value is not None})
    place = out or Path("runs") / f"intrinsic-{Path(run.task).name}-{run.id}"
    _sweep(run, place, dims, seeds, family, subspace_lr, share, as_json)


def _run(folder: Path | None, on: str | None, task: str | None, settings: dict[str, Any]) -> Run:
    """Return full fine-tuning as a run that is judged on dev alone."""
    from deltatune.theory.instruments import full_run
    from deltatune.tuning import Run

    if folder is None and (on is None or task is None):
        raise DeltaTuneError(
            "what to train is not known; give the folder of a run of Full(), or --on BACKBONE --task NAME."
        )
    run = Run("Full()", str(on), str(task), Recipe()) if folder is None else full_run(folder)
    recipe = replace(run.recipe, **settings, test=False)
    return replace(run, backbone=on or run.backbone, task=task or run.task, recipe=recipe)


def _sweep(
    run: Run, out: Path, dims: str, seeds: str, family: str, rate: float | None, share: float, as_json: bool
) -> None:
    from deltatune.cli.theory.show import show
    from deltatune.theory.instruments import intrinsic

    tried = _numbers("dims", dims)
    families = {d: _delta(family, d) for d in tried}
    recipe = None if rate is None else replace(run.recipe, lr=rate)
    typer.echo(f"{run.delta} and {family} on {run.backbone} for {run.task}, in {out}", err=True)
    found = intrinsic(run, families, _numbers("seeds", seeds), out / "runs", recipe, share, _say)
    show(found, as_json, out)


def _delta(family: str, d: int) -> Delta:
    import deltatune as dt

    if "{d}" not in family:
        raise DeltaTuneError(
            f"--family {family!r} has no {{d}}, the place of the dimensions; write for example 'SAID(dim={{d}})'."
        )
    return dt.parse(family.replace("{d}", str(d)))


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DeltaTuneError(f"--{name} is {text!r}; write whole numbers with commas, such as 10,30,100.") from None


def _say(run: Run, dev: float) -> None:
    typer.echo(f"  {run.delta}, seed {run.seed}: dev {dev:.1f}", err=True)
