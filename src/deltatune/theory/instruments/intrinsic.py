"""`intrinsic`: the fewest dimensions in which training reaches a share of full fine-tuning's score, by runs of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from deltatune.core.delta import Delta
from deltatune.errors import DeltaTuneError
from deltatune.theory.exhibit import Exhibit, Lines, Table
from deltatune.theory.intrinsic import SHARE, IntrinsicDimension, OnRun, sweep_runs
from deltatune.theory.subject import is_full, recorded
from deltatune.tuning import Recipe, Run


def intrinsic(
    run: Run,
    families: Mapping[int, Delta],
    seeds: Sequence[int],
    folder: Path,
    recipe: Recipe | None = None,
    share: float = SHARE,
    on_run: OnRun | None = None,
) -> Exhibit:
    """Sweep over deltas by their dimensions by runs in `folder`, none of them done twice; `recipe` is theirs, if not the run's."""
    recipes: Mapping[int, Recipe] = dict.fromkeys(families, recipe) if recipe else {}
    found = sweep_runs(run, list(families), seeds, folder, families.__getitem__, recipes, share, on_run)
    tried = ", ".join(map(str, families.values()))
    about = {"Backbone": run.backbone, "Task": run.task, "Full fine-tuning": run.delta, "Tried": tried}
    return Exhibit("intrinsic", about, [found], [_scores(found)], [_curve(found)])


def _scores(found: IntrinsicDimension) -> Table:
    means = [fmean(column) for column in zip(*found.scores, strict=True)]
    rows = [(f"{d:,}", *s, mean) for d, s, mean in zip(found.dims, zip(*found.scores, strict=True), means, strict=True)]
    rows += [("full", *found.full, fmean(found.full))]
    rows += [
        (f"{100 * found.share:g} % of full", *(found.share * s for s in found.full), found.share * fmean(found.full))
    ]
    rows += [("intrinsic dimension", *found.by_seed, found.dimension)]
    return Table("Dev scores", ("dimensions", *(f"seed {seed}" for seed in found.seeds), "mean"), tuple(rows))


def _curve(found: IntrinsicDimension) -> Lines:
    series = {
        f"seed {seed}": list(zip(found.dims, s, strict=True)) for seed, s in zip(found.seeds, found.scores, strict=True)
    }
    level = found.share * fmean(found.full)
    return Lines("Score against dimensions", "dimensions", "dev score", series, "x", level=level)


def full_run(folder: Path) -> Run:
    """Return the run of full fine-tuning in a folder; raises `DeltaTuneError` for a folder with another run or none."""
    run = recorded(folder)
    if run is None:
        raise DeltaTuneError(f"{folder} is no run (there is no run.json); give one of Full() that tune wrote.")
    if not is_full(run.delta):
        raise DeltaTuneError(
            f"{folder} is a run of {run.delta}, but the threshold is full fine-tuning's score; give a run of Full(), or "
            f"--on {run.backbone} --task {run.task}, with --lr for Full()."
        )
    return run
