"""What a study shows, as plain values: each number carries the runs it is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

from deltatune.study.results import Choice, Record, Results
from deltatune.study.statistics import Difference, Ranks, Summary, adjust, difference, ranks, summary, wilcoxon

CONVERGED = 0.9


@dataclass(frozen=True)
class Score:
    """A method's test score on a task: mean and spread over seeds, % of the baseline's, points above the majority class."""

    method: str
    task: str
    records: tuple[Record, ...]
    summary: Summary
    percent_of_baseline: float | None
    over_majority: float | None


@dataclass(frozen=True)
class MethodLine:
    """A method on one backbone, averaged over the tasks that all methods have (`average` and what follows from it).

    `error` is the standard error of the average from the seeds; costs are medians over runs, `train_seconds` the mean.
    `reached` of `of` runs came to 90 % of the best dev score on their task, in `steps` steps (median of those).
    """

    method: str
    delta: str
    runs: int
    average: float | None
    error: float | None
    percent_of_baseline: float | None
    over_majority: float | None
    rank: float | None
    parameters: float
    tunable_percent: float
    file_bytes: float
    train_seconds: float
    step_seconds: float | None
    peak_memory_bytes: float
    steps: float | None
    reached: int
    of: int


@dataclass(frozen=True)
class Comparison:
    """Method a minus method b over the tasks of both; `p` is Wilcoxon's over tasks, corrected for the number of pairs."""

    a: str
    b: str
    tasks: int
    difference: Difference
    p: float | None


@dataclass(frozen=True)
class BackboneTables:
    """All tables of one backbone; `common` are the tasks that every method has a score on."""

    backbone: str
    tasks: tuple[str, ...]
    common: tuple[str, ...]
    lines: tuple[MethodLine, ...]
    scores: dict[tuple[str, str], Score]
    majority: dict[str, float | None]
    ranks: Ranks | None
    ranked: tuple[str, ...]
    categories: dict[str, dict[str, float]]
    comparisons: tuple[Comparison, ...]
    search: tuple[Choice, ...]


def tables(results: Results, backbone: str) -> BackboneTables:
    """All tables of one backbone, methods in the order of their average, best first."""
    final = [record for record in results.final if record.backbone == backbone and record.test is not None]
    planned = {gap.task for gap in results.gaps if gap.backbone == backbone and gap.part == "final"}
    tasks = tuple(task for task in results.tasks if task in planned or any(record.task == task for record in final))
    methods = tuple(method for method in results.methods if any(record.method == method for record in final))
    scores = _scores(results, final, methods, tasks)
    common = tuple(task for task in tasks if methods and all((method, task) in scores for method in methods))
    ranking = ranks([[scores[method, task].summary.mean for method in methods] for task in common]) if common else None
    mean_rank = dict(zip(methods, ranking.mean, strict=True)) if ranking else {}
    lines = [_line(results, final, scores, common, method, mean_rank.get(method)) for method in methods]
    lines.sort(key=lambda line: -(line.average if line.average is not None else float("-inf")))
    majority = {task: next((r.majority for r in final if r.task == task), None) for task in tasks}
    return BackboneTables(
        backbone=backbone,
        tasks=tasks,
        common=common,
        lines=tuple(lines),
        scores=scores,
        majority=majority,
        ranks=ranking,
        ranked=methods,
        categories=_categories(results, scores, tuple(line.method for line in lines), common),
        comparisons=_comparisons(scores, tuple(line.method for line in lines), common),
        search=tuple(choice for choice in results.choices if choice.backbone == backbone),
    )


def _scores(
    results: Results, final: Sequence[Record], methods: Sequence[str], tasks: Sequence[str]
) -> dict[tuple[str, str], Score]:
    groups = {
        (method, task): tuple(sorted((r for r in final if (r.method, r.task) == (method, task)), key=lambda r: r.seed))
        for method in methods
        for task in tasks
    }
    means = {key: fmean(map(_test, records)) for key, records in groups.items() if records}
    scores: dict[tuple[str, str], Score] = {}
    for (method, task), mean in means.items():
        records = groups[method, task]
        full, majority = means.get((results.baseline or "", task)), records[0].majority
        scores[method, task] = Score(
            method=method,
            task=task,
            records=records,
            summary=summary(list(map(_test, records))),
            percent_of_baseline=100.0 * mean / full if full else None,
            over_majority=None if majority is None else mean - majority,
        )
    return scores


def _test(record: Record) -> float:
    assert record.test is not None
    return record.test


def _line(
    results: Results,
    final: Sequence[Record],
    scores: dict[tuple[str, str], Score],
    common: Sequence[str],
    method: str,
    rank: float | None,
) -> MethodLine:
    runs = [record for record in final if record.method == method]
    own = [scores[method, task] for task in common]
    baseline = results.baseline or ""
    full = [scores[baseline, task].summary.mean for task in common if (baseline, task) in scores]
    average = fmean(score.summary.mean for score in own) if own else None
    over = [score.over_majority for score in own if score.over_majority is not None]
    reached, of = _convergence(final, runs)
    return MethodLine(
        method=method,
        delta=results.methods[method],
        runs=len(runs),
        average=average,
        error=_error(own),
        # The ratio of averages, not the average of ratios, which one weak baseline score would dominate.
        percent_of_baseline=100.0 * average / fmean(full) if average is not None and full and any(full) else None,
        over_majority=fmean(over) if over else None,
        rank=rank,
        parameters=_median(runs, lambda record: record.parameters),
        tunable_percent=_median(runs, lambda record: 100.0 * record.parameters / record.backbone_parameters),
        file_bytes=_median(runs, lambda record: record.file_bytes),
        train_seconds=fmean(record.train_seconds for record in runs),
        step_seconds=median(timed) if (timed := [r.step_seconds for r in runs if r.step_seconds is not None]) else None,
        peak_memory_bytes=_median(runs, lambda record: record.peak_memory_bytes),
        steps=median(reached) if reached else None,
        reached=len(reached),
        of=of,
    )


def _median(records: Sequence[Record], value: Callable[[Record], float]) -> float:
    return float(median(map(value, records)))


def _error(scores: Sequence[Score]) -> float | None:
    """Standard error over seeds of an average over tasks; None while some task has a single seed."""
    if not scores or any(score.summary.sd is None for score in scores):
        return None
    squares = sum((score.summary.sd or 0.0) ** 2 / score.summary.n for score in scores)
    return squares**0.5 / len(scores)


def _convergence(final: Sequence[Record], runs: Sequence[Record]) -> tuple[list[float], int]:
    """The steps after which runs came to 90 % of the best dev score that any method's mean reached on the task."""
    reached: list[float] = []
    for record in runs:
        target = CONVERGED * _best_dev([other for other in final if other.task == record.task])
        step = next((step for step, dev in record.curve if dev >= target), None)
        if step is not None:
            reached.append(step)
    return reached, len(runs)


def _best_dev(records: Sequence[Record]) -> float:
    methods = {record.method for record in records}
    return max(fmean(_dev(record) for record in records if record.method == method) for method in methods)


def _dev(record: Record) -> float:
    return max((dev for _, dev in record.curve), default=record.dev or 0.0)


def _categories(
    results: Results, scores: dict[tuple[str, str], Score], methods: Sequence[str], common: Sequence[str]
) -> dict[str, dict[str, float]]:
    groups: dict[str, list[str]] = {}
    for task in common:
        groups.setdefault(results.category(task), []).append(task)
    return {
        name: {method: fmean(scores[method, task].summary.mean for task in tasks) for method in methods}
        for name, tasks in groups.items()
    }


def _comparisons(
    scores: dict[tuple[str, str], Score], methods: Sequence[str], common: Sequence[str]
) -> tuple[Comparison, ...]:
    pairs = [(a, b) for a, b in combinations(methods, 2)] if common else []
    raw = [wilcoxon([scores[a, task].summary.mean - scores[b, task].summary.mean for task in common]) for a, b in pairs]
    return tuple(
        Comparison(a, b, len(common), _difference(scores, a, b, common), p)
        for (a, b), p in zip(pairs, adjust(raw), strict=True)
    )


def _difference(scores: dict[tuple[str, str], Score], a: str, b: str, common: Sequence[str]) -> Difference:
    ones = [scores[a, task].records for task in common]
    others = [scores[b, task].records for task in common]
    items = [_item_differences(one, other) for one, other in zip(ones, others, strict=True)]
    return difference(
        [list(map(_test, records)) for records in ones],
        [list(map(_test, records)) for records in others],
        items if all(items) else (),
    )


def _item_differences(ones: Sequence[Record], others: Sequence[Record]) -> list[float]:
    """The mean over seeds of one method's item scores minus the other's; empty when they were tested on other items."""
    if len({record.item_ids for record in (*ones, *others)}) != 1 or not ones[0].items:
        return []
    means = [[fmean(scores) for scores in zip(*(r.items for r in side), strict=True)] for side in (ones, others)]
    return [one - other for one, other in zip(*means, strict=True)]
