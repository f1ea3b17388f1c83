"""Intrinsic dimension d_90: the fewest dimensions in which training reaches 90 % of full fine-tuning's score.

    theta = theta_0 + P z, z [d], P random (DID; SAID scales it by tensor)        d_90 = min {d : score(d) >= 0.9 score(full)}

Assumed: the score does not fall with d. For each seed the scores are smoothed to the nearest non-decreasing ones (isotonic
regression) and read between two dimensions along log d; d_90 is the geometric mean over seeds, with Student's t interval
of log d_90. Scores count from 0, as in the papers: the score of a majority guess is not taken off. Sources: Li et al.,
2018, arXiv:1804.08838; Aghajanyan et al., 2021, arXiv:2012.13255.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import exp, isfinite, log, sqrt
from pathlib import Path
from statistics import fmean, stdev

from deltatune import tuning
from deltatune.core.delta import Delta, as_delta
from deltatune.core.method import Method
from deltatune.errors import DeltaTuneError
from deltatune.methods.reparameterization.intrinsic_dimension import SAID
from deltatune.theory.finding import Finding
from deltatune.tuning import Recipe, Run

SHARE, LEVEL = 0.9, 0.95
Train = Callable[[int, int], float]
OnRun = Callable[[Run, float], None]


@dataclass(frozen=True)
class IntrinsicDimension(Finding):
    """d_90 by seed, None where no dimension reached the threshold, with what it was read from.

    `scores[i][j]` is that of seed i in dims[j] dimensions, and `full[i]` that of full fine-tuning.
    """

    dims: tuple[int, ...]
    seeds: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    full: tuple[float, ...]
    share: float = SHARE

    @property
    def by_seed(self) -> tuple[float | None, ...]:
        """The dimension of each seed."""
        pairs = zip(self.scores, self.full, strict=True)
        return tuple(crossing(self.dims, scores, self.share * full) for scores, full in pairs)

    @property
    def dimension(self) -> float | None:
        """The geometric mean over seeds; None where one did not reach the threshold."""
        logs = self._logs()
        return None if logs is None else exp(fmean(logs))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t interval over seeds; None for a single seed, and where one did not reach the threshold."""
        from scipy import stats

        logs = self._logs()
        if logs is None or len(logs) < 2:
            return None
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(logs) - 1)) * stdev(logs) / sqrt(len(logs))
        return exp(fmean(logs) - half), exp(fmean(logs) + half)

    @property
    def finding(self) -> str:
        name = f"d_{100 * self.share:g}"
        if self.dimension is None:
            missed = sum(d is None for d in self.by_seed)
            return (
                f"{name} is above {self.dims[-1]:,}: {missed} of {len(self.seeds)} seeds did not reach {100 * self.share:g} % "
                "of full fine-tuning; sweep over more dimensions."
            )
        spread = (
            "one seed" if self.interval is None else f"95 % interval {self.interval[0]:,.0f} to {self.interval[1]:,.0f}"
        )
        least = " (reached with the fewest that were tried: sweep over fewer)" if self.dimension <= self.dims[0] else ""
        return f"{name} is {self.dimension:,.0f} ({spread}, {len(self.seeds)} seeds){least}."

    def _logs(self) -> list[float] | None:
        known = [log(d) for d in self.by_seed if d is not None]
        return known if len(known) == len(self.seeds) else None


def crossing(dims: Sequence[int], scores: Sequence[float], threshold: float) -> float | None:
    """Return where non-decreasing scores pass a threshold, between two dimensions along log d; None where they do not.

    The scores are smoothed first to the nearest non-decreasing ones, in squares (isotonic regression).
    """
    from sklearn.isotonic import isotonic_regression

    smooth = isotonic_regression(list(scores)).tolist()
    if smooth[0] >= threshold:
        return float(dims[0])
    for (d, low), (e, high) in pairwise(zip(dims, smooth, strict=True)):
        if high >= threshold:
            return exp(log(d) + (log(e) - log(d)) * (threshold - low) / (high - low))
    return None


def sweep(
    train: Train, full: Callable[[int], float], dims: Sequence[int], seeds: Sequence[int], share: float = SHARE
) -> IntrinsicDimension:
    """Return the intrinsic dimension of anything trainable: `train(d, seed)` and `full(seed)` return scores, higher is better.

    Raises `DeltaTuneError` unless the dimensions ascend from 1 or more, there is a seed, and full scores are above 0.
    """
    if len(dims) < 2 or min(dims) < 1 or list(dims) != sorted(set(dims)) or not seeds or not 0 < share <= 1:
        raise DeltaTuneError(
            f"dims={list(dims)}, seeds={list(seeds)}, share={share}: write two or more ascending dimensions from 1, e.g. "
            "[10, 30, 100, 300], at least one seed, and a share above 0 and up to 1."
        )
    best = tuple(full(seed) for seed in seeds)
    if not all(isfinite(score) and score > 0 for score in best):
        raise DeltaTuneError(
            f"full fine-tuning scores {list(best)}, of which {100 * share:g} % is no threshold; scores are above 0, higher is "
            "better: write exp(-loss) for a loss."
        )
    scores = tuple(tuple(train(d, seed) for d in dims) for seed in seeds)
    return IntrinsicDimension(tuple(dims), tuple(seeds), scores, best, share)


def sweep_runs(
    run: Run,
    dims: Sequence[int],
    seeds: Sequence[int],
    folder: Path | str,
    family: Callable[[int], Delta | Method] = SAID,
    recipes: Mapping[int, Recipe] | None = None,
    share: float = SHARE,
    on_run: OnRun | None = None,
) -> IntrinsicDimension:
    """Return the intrinsic dimension of a backbone and a task by ordinary runs, judged by their dev score in percent.

    `run` is full fine-tuning (its delta, usually Full()), and `family(d)` the delta of d dimensions: SAID, DID, or
    `Reparam(PromptTuning(), through=Subspace(dim=d))`. `recipes` has that of a dimension where it is not the run's. Runs
    lie in `folder`, and finished ones are not done again; `on_run` gets each with its score.
    """
    if not run.recipe.eval_every:
        raise DeltaTuneError(
            "the recipe has eval_every=0, so there are no dev scores to compare; write for example 50."
        )
    root = Path(folder)

    def score(other: Run) -> float:
        dev = float(tuning.tune(other, root / other.id)["dev"])
        if on_run:
            on_run(other, dev)
        return dev

    def train(d: int, seed: int) -> float:
        recipe = (recipes or {}).get(d, run.recipe)
        return score(replace(run, delta=str(as_delta(family(d))), seed=seed, recipe=recipe))

    return sweep(train, lambda seed: score(replace(run, seed=seed)), dims, seeds, share)
