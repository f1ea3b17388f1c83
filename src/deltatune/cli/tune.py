"""`deltatune tune`: train one delta on one task, watch it, and see what came out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.tuning.recipe import COMPILERS, OPTIMIZERS, PRECISIONS, SCHEDULES, Recipe

if TYPE_CHECKING:
    from rich.progress import Progress

    from deltatune.tuning import Run
    from deltatune.tuning.cache import Bound

INTERRUPTED = 130
MORE = "Finer control"


def _option(help: str, panel: str | None = None) -> Any:
    return typer.Option(help=help, rich_help_panel=panel)


Delta = Annotated[str, _option("What to train: methods, with their places where they are not the default ones.")]
Backbone = Annotated[
    str, _option("The frozen model: a built-in name, a folder, or a hub name; `random:` before it forgets its weights.")
]
Task = Annotated[
    str, _option("What to learn: a built-in task, a name in $DELTATUNE_DATA, a file, or a hub name such as glue/sst2.")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder for the run; by default runs/<task>-<id of the run>.")
]
Start = Annotated[
    Path | None,
    _option(
        "Train on top of these weights, a folder that tune wrote: they stay frozen, and both are saved as one delta."
    ),
]
Seed = Annotated[int, _option("Decides the start of the delta, the order of the data and the choice of shots.")]
Steps = Annotated[int, _option("How many batches to train on.")]
Batch = Annotated[int, _option("Examples in a batch.")]
Rate = Annotated[float, _option("Learning rate at its highest.")]
Shots = Annotated[
    int, _option("Train on this many examples a label (of the whole task when it is generation); 0 takes all.")
]
Patience = Annotated[int, _option("Stop after this many dev evaluations without a new best; 0 never stops early.")]
Optimizer = Annotated[str, _option(f"One of {', '.join(OPTIMIZERS)}.", MORE)]
Schedule = Annotated[str, _option(f"How the learning rate goes on after the warmup: {', '.join(SCHEDULES)}.", MORE)]
Warmup = Annotated[float, _option("Share of the steps in which the learning rate rises.", MORE)]
Decay = Annotated[float, _option("Weight decay of the delta's parameters.", MORE)]
Clip = Annotated[float, _option("Largest norm of the gradient; 0 does not clip.", MORE)]
Precision = Annotated[str, _option(f"What to compute in: {', '.join(PRECISIONS)}.", MORE)]
EvalEvery = Annotated[int, _option("Steps between dev evaluations; 0 keeps the last step instead of the best.", MORE)]
DevLimit = Annotated[int, _option("Dev examples to evaluate on; 0 takes all.", MORE)]
TestLimit = Annotated[int, _option("Test examples to evaluate on at the end; 0 takes all.", MORE)]
MaxInput = Annotated[int, _option("Tokens of a prompt; a longer one loses its beginning.", MORE)]
MaxTarget = Annotated[int, _option("Tokens of an answer.", MORE)]
EvalBatch = Annotated[int, _option("Examples in a batch of an evaluation.", MORE)]
CheckpointEvery = Annotated[int, _option("Steps between checkpoints; 0 writes none.", MORE)]
Cache = Annotated[
    str,
    _option(
        "Memory for what the blocks below the delta make of each example, such as 2GB: they are computed once. 0 for none.",
        MORE,
    ),
]
OnDisk = Annotated[bool, _option("Keep the cache in the run's folder, on disk, instead of in memory.", MORE)]
Compiler = Annotated[
    str,
    _option(f"What compiles the backbone with its delta, which pays on a GPU: {', '.join(COMPILERS)}.", MORE),
]
Test = Annotated[bool, _option("Score the test split at the end; without it the run is judged on dev alone.", MORE)]
Budget = Annotated[
    str, _option("Most memory to use, such as 2GB: as many blocks are recomputed as that takes; 0 sets no limit.", MORE)
]
Dropout = Annotated[bool, _option("Train with the backbone's own dropout.", MORE)]


def tune(
    task: Task,
    delta: Delta = "LoRA(rank=8)",
    backbone: Backbone = "pebble",
    out: Out = None,
    start: Start = None,
    seed: Seed = 0,
    steps: Steps = Recipe.steps,
    batch: Batch = Recipe.batch,
    lr: Rate = Recipe.lr,
    shots: Shots = Recipe.shots,
    patience: Patience = Recipe.patience,
    optimizer: Optimizer = Recipe.optimizer,
    schedule: Schedule = Recipe.schedule,
    warmup: Warmup = Recipe.warmup,
    weight_decay: Decay = Recipe.weight_decay,
    clip: Clip = Recipe.clip,
    precision: Precision = Recipe.precision,
    eval_every: EvalEvery = Recipe.eval_every,
    dev_limit: DevLimit = Recipe.dev_limit,
    test_limit: TestLimit = Recipe.test_limit,
    max_input: MaxInput = Recipe.max_input,
    max_target: MaxTarget = Recipe.max_target,
    eval_batch: EvalBatch = Recipe.eval_batch,
    checkpoint_every: CheckpointEvery = Recipe.checkpoint_every,
    dropout: Dropout = Recipe.dropout,
    test: Test = Recipe.test,
    compiler: Compiler = Recipe.compiler,
    cache: Cache = "1GB",
    cache_on_disk: OnDisk = False,
    memory_budget: Budget = "0",
) -> None:
    """Train a delta on a task and test it once, at its best dev score.

    Example: deltatune tune --task topic --delta 'LoRA(rank=8)' --lr 3e-3 --out runs/topic

    Stop it with Ctrl-C, or in any other way: the same command continues where the last checkpoint was.
    """
    run, bound = _asked(locals())
    _show(run, out or Path("runs") / f"{Path(task).name}-{run.id}", bound, memory_budget)


def _asked(given: dict[str, Any]) -> tuple[Run, Bound]:
    """Return what the options say to train, and how much to keep of the blocks below the delta."""
    from deltatune.tuning import Run
    from deltatune.tuning.cache import Bound
    from deltatune.tuning.memory import size

    recipe = Recipe(**{item.name: given[item.name] for item in dataclasses.fields(Recipe)})
    start = None if given["start"] is None else str(given["start"])
    run = Run(given["delta"], given["backbone"], given["task"], recipe, given["seed"], start)
    return run, Bound(size(given["cache"]), given["cache_on_disk"])


def _show(run: Run, folder: Path, cache: Bound, budget: str) -> None:
    """Train with a progress bar, then print what came out; Ctrl-C says how to go on."""
    from rich.console import Console

    from deltatune.tuning import tune
    from deltatune.tuning.memory import size

    console = Console(highlight=False)
    top = f", on top of {run.start}" if run.start else ""
    console.print(f"[bold]{run.delta}[/bold] on {run.backbone}{top} for {run.task}, in {folder}", markup=True)
    try:
        with _bar(console) as progress:
            result = tune(run, folder, _follow(progress, run.recipe.steps), cache, size(budget))
    except KeyboardInterrupt:
        every = run.recipe.checkpoint_every
        where = f"it continues from its last checkpoint (one every {every} steps)" if every else "it starts over"
        console.print(f"[yellow]Stopped.[/yellow] Issue the same command again and {where}.")
        raise typer.Exit(INTERRUPTED) from None
    _summarize(console, result, folder)


def _bar(console: Any) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}{task.fields[dev]}"),
        console=console,
    )


def _follow(progress: Progress, steps: int) -> Callable[[dict[str, Any]], None]:
    """Return what moves the bar by the lines of the log."""
    bar = progress.add_task("loading", total=steps, loss="", dev="")

    def on_step(line: dict[str, Any]) -> None:
        if "dev" in line:
            progress.update(bar, dev=f"  dev {line['dev']:.1f}")
            return
        last = line["step"] == steps
        progress.update(
            bar, completed=line["step"], loss=f"loss {line['loss']:.3f}", description="testing" if last else "training"
        )

    return on_step


def _summarize(console: Any, result: dict[str, Any], folder: Path) -> None:
    from rich.table import Table

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    share = 100 * result["parameters"] / result["backbone_parameters"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row(f"test {result['metric']}", f"[bold]{percent(result['test'])}[/bold]")
    if result["majority"] is not None:
        table.add_row("  always the commonest label", percent(result["majority"]))
    table.add_row("dev, at its best", f"{percent(result['dev'])} (step {result['best_step']} of {result['steps']})")
    table.add_row("trained parameters", f"{result['parameters']:,} ({share:.3g} % of the backbone's)")
    table.add_row("file", f"{result['file_bytes'] / 1024:,.0f} KiB")
    table.add_row("time", f"{result['seconds']['total']:.0f} s")
    if (longest := result.get("longest_step_seconds")) and None not in longest.values():
        found = f"{longest['measured']:.3g} s (planned {longest['planned']:.3g} s)"
        table.add_row("  a step on the longest batches", found)
    for words, text in _memory(result["peak_memory_bytes"], result.get("memory")):
        table.add_row(words, text)
    if cache := result.get("cache"):
        table.add_row("blocks below the delta", _kept(cache))
    console.print(table)
    console.print(
        f'To use it: deltatune predict {folder} "some text"; in Python: dt.load(model, "{folder}")', soft_wrap=True
    )


def _kept(cache: dict[str, Any]) -> str:
    """Say what was kept of the blocks that the delta leaves alone, or why nothing was."""
    if "off" in cache:
        return f"computed in every step, as {cache['off']}"
    size = f"{cache['bytes'] / 2**20:,.0f} MiB"
    return f"{len(cache['skipped'])} computed once for each of {cache['examples']:,} examples ({size})"


def _memory(peak: int, memory: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Say the peak, and beside what was planned where it was: whole, and above what the process held before its first step."""
    if memory is None:
        return [("peak memory", f"{peak / 2**20:,.0f} MiB")]
    planned, held, count = memory["planned"], memory["resident"], len(memory["ledger"]["recomputed"])
    rows = [("peak memory", _beside(peak, planned)), ("  of this training", _beside(peak - held, planned - held))]
    return rows + ([("  blocks recomputed", str(count))] if count else [])


def _beside(found: int, planned: int) -> str:
    return f"{found / 2**20:,.0f} MiB, planned {planned / 2**20:,.0f} MiB ({planned / max(found, 1) - 1:+.0%})"
