"""The statistics of a study: spread over seeds, tests paired over tasks and over test items, ranks. All from scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """n values: their mean, sample standard deviation, and the t interval that holds the true mean with 95 %.

    `sd`, `low` and `high` are None for a single value, which tells nothing about its spread.
    """

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods and its 95 % interval; `low` and `high` are None where no spread is known."""

    mean: float
    low: float | None
    high: float | None

    @property
    def within_noise(self) -> bool:
        """True unless the interval leaves 0 out."""
        return self.low is None or self.high is None or self.low <= 0.0 <= self.high


@dataclass(frozen=True)
class Ranks:
    """Ranks of k methods over n tasks, 1 = best, equal scores share their mean rank.

    `p` is Friedman's test that all methods are alike; two mean ranks further apart than `critical` differ (Nemenyi, 95 %).
    Both are None with fewer than 3 methods or 2 tasks. Source: Demsar, JMLR 7 (2006), section 3.2.2.
    """

    by_task: tuple[tuple[float, ...], ...]
    mean: tuple[float, ...]
    p: float | None
    critical: float | None


def summary(values: Sequence[float]) -> Summary:
    """Mean, spread and t interval of values over seeds; raises `ValueError` on none."""
    import numpy
    from scipy import stats

    if not values:
        raise ValueError("a summary needs at least one value")
    n, mean = len(values), float(numpy.mean(values))
    if n == 1:
        return Summary(1, mean, None, None, None)
    sd = float(numpy.std(values, ddof=1))
    if sd == 0.0:
        return Summary(n, mean, 0.0, mean, mean)
    low, high = stats.t.interval(LEVEL, n - 1, loc=mean, scale=sd / math.sqrt(n))
    return Summary(n, mean, sd, float(low), float(high))


def wilcoxon(differences: Sequence[float]) -> float | None:
    """Two-sided p of the Wilcoxon signed-rank test on differences, one a task; None when none differs from 0."""
    from scipy import stats

    if not any(differences):
        return None
    found: Any = stats.wilcoxon(list(differences), zero_method="zsplit")
    return float(found.pvalue)


def adjust(p_values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for testing several pairs at once (false discovery rate, Benjamini and Hochberg 1995)."""
    from scipy import stats

    known = [p for p in p_values if p is not None]
    corrected = iter(stats.false_discovery_control(known)) if known else iter(())
    return [None if p is None else float(next(corrected)) for p in p_values]


def item_error(differences: Sequence[Sequence[float]]) -> float | None:
    """Standard error of the mean over tasks of the mean item difference, by a bootstrap of the items within each task.

    `differences[t][i]` is the score of one method minus that of the other on item i of task t, so the pairing is kept.
    """
    import numpy
    from scipy import stats

    samples = [numpy.asarray(task, dtype=float) for task in differences if len(task) > 1]
    if not samples:
        return None

    def statistic(*tasks: numpy.ndarray, axis: int = -1) -> numpy.ndarray:
        return numpy.mean([task.mean(axis=axis) for task in tasks], axis=0)

    found = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, method="percentile", vectorized=True, batch=200, rng=0
    )
    return float(found.standard_error)


def difference(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], items: Sequence[Sequence[float]] = ()
) -> Difference:
    """The mean over tasks of a's mean score minus b's, with an interval from the seeds and, where given, the test items.

    `a[t]` and `b[t]` hold the scores on task t, one a seed; `items` is as in `item_error`. With T tasks the variance is

        V = V_a + V_b + V_items,    V_a = s_a^2 sum_t (1 / n_at) / T^2

    where s_a^2 is pooled over tasks, and the interval is Student's t with (V^2 / (V_a^2 / d_a + V_b^2 / d_b)) degrees
    of freedom (Welch 1947, Satterthwaite 1946). A method with one seed a task is taken to vary as much as the other.
    """
    import numpy
    from scipy import stats

    mean = float(numpy.mean([numpy.mean(x) - numpy.mean(y) for x, y in zip(a, b, strict=True)]))
    pooled = [_pooled(a), _pooled(b)]
    error = item_error(items)
    if error is None and not any(pooled):
        return Difference(mean, None, None)
    known = [each or other or (0.0, math.inf) for each, other in zip(pooled, reversed(pooled), strict=True)]
    shares = [sum(1 / len(seeds) for seeds in side) / len(side) ** 2 for side in (a, b)]
    variances = [variance * share for (variance, _), share in zip(known, shares, strict=True)]
    total = sum(variances) + (error or 0.0) ** 2
    if total == 0.0:
        return Difference(mean, mean, mean)
    spread = sum(variance**2 / degrees for variance, (_, degrees) in zip(variances, known, strict=True))
    low, high = stats.t.interval(LEVEL, total**2 / spread if spread else math.inf, loc=mean, scale=math.sqrt(total))
    return Difference(mean, float(low), float(high))


def _pooled(groups: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The variance within groups, and its degrees of freedom; None when every group has one value."""
    import numpy

    degrees = sum(len(group) - 1 for group in groups)
    squares = sum(float(numpy.var(group)) * len(group) for group in groups)
    return (squares / degrees, float(degrees)) if degrees else None


def ranks(scores: Sequence[Sequence[float]]) -> Ranks:
    """Rank methods by `scores[task][method]`, higher is better; raises `ValueError` without tasks."""
    import numpy
    from scipy import stats

    if not scores:
        raise ValueError("ranks need at least one task")
    table = stats.rankdata(-numpy.asarray(scores, dtype=float), axis=1)
    n, k = table.shape
    p = critical = None
    if k >= 3 and n >= 2:
        alike = bool(numpy.all(table == table[0, 0]))
        p = 1.0 if alike else float(stats.friedmanchisquare(*table.T).pvalue)
        critical = float(
            stats.studentized_range.ppf(LEVEL, k, numpy.inf) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
        )
    return Ranks(tuple(map(tuple, table.tolist())), tuple(table.mean(axis=0).tolist()), p, critical)
