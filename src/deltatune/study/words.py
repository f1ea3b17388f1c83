"""Numbers as a reader wants them, and the sentences at the top of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltatune.study.analyses import BackboneTables, Comparison
from deltatune.study.results import Results

NOTHING = "–"
LISTED = 6


def score(value: float | None, digits: int = 1) -> str:
    """A score in percent."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference of scores, always with its sign."""
    return NOTHING if value is None else f"{value:+.1f}".replace("-", "−")


def count(value: float | None) -> str:
    """A number of parameters or steps, short: 98.3 k, 10.2 M."""
    if value is None:
        return NOTHING
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """A number of bytes, short."""
    return NOTHING if value is None else f"{count(value)}B" if value >= 1e3 else f"{value:g} B"


def percent(value: float | None) -> str:
    """A share in percent with two significant digits below 10."""
    if value is None:
        return NOTHING
    return f"{value:.2g}" if 0 < value < 10 else f"{value:.1f}".removesuffix(".0")


def seconds(value: float | None) -> str:
    """A duration."""
    if value is None:
        return NOTHING
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def p_value(value: float | None) -> str:
    """A p value."""
    if value is None:
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def short(value: float | None) -> str:
    """A number with three significant digits."""
    return NOTHING if value is None else f"{value:.3g}"


def number(n: int, word: str) -> str:
    """A count with its noun: 1 task, 2 tasks."""
    return f"{n} {word}{'' if n == 1 else 's'}"


def opening(results: Results) -> str:
    """What the study did, in one sentence."""
    final = results.final
    search = f", after {number(len(results.search), 'search run')} on dev scores" if results.search else ""
    seeds = sorted({record.seed for record in final} | {gap.seed for gap in results.gaps if gap.part == "final"})
    return (
        f"{number(len(final), 'run')} of {number(len(results.methods), 'method')} on "
        f"{number(len(results.backbones), 'frozen backbone')} and "
        f"{number(len({record.task for record in final}), 'task')}, "
        f"{number(len(seeds), 'seed')} ({', '.join(map(str, seeds))}){search}."
    )


def missing(results: Results) -> str:
    """What is not there, in one sentence; empty when nothing is missing."""
    gaps = [gap for gap in results.gaps if gap.part == "final"]
    lost = [gap for gap in results.gaps if gap.part == "search" and gap.state == "failed"]
    parts = []
    if gaps:
        states = [f"{sum(gap.state == state for gap in gaps)} {state}" for state in ("failed", "running", "pending")]
        parts.append(f"{number(len(gaps), 'run')} missing ({', '.join(s for s in states if not s.startswith('0 '))}).")
    if lost:
        parts.append(f"{number(len(lost), 'candidate')} of the search failed and so could not be chosen.")
    return " ".join(parts)


def findings(results: Results, tables: BackboneTables) -> list[str]:
    """What the numbers of one backbone say, and what they do not, in a few sentences."""
    lines = [line for line in tables.lines if line.average is not None]
    if not lines:
        return ["No task has a score of every method yet, so there is no average."]
    best = lines[0]
    text = f"Best average over {number(len(tables.common), 'task')}: {best.method}, {score(best.average)}"
    rivals = [line for line in lines if line.method != results.baseline]
    top = rivals[0] if rivals else best
    if best.method != results.baseline and best.percent_of_baseline is not None:
        text += f" ({score(best.percent_of_baseline)} % of {results.baseline} with {percent(best.tunable_percent)} % of the parameters)"
    sentences = [text + "."]
    if best.method == results.baseline and top is not best:
        sentences.append(
            f"Best besides it: {top.method}, {score(top.average)} ({score(top.percent_of_baseline)} % of {results.baseline} "
            f"with {percent(top.tunable_percent)} % of the parameters)."
        )
    return [*sentences, *_noise(tables.comparisons), *_seeds(tables), *_weak(tables)]


def _noise(comparisons: Sequence[Comparison]) -> list[str]:
    if not comparisons:
        return []
    same = [f"{pair.a} and {pair.b}" for pair in comparisons if pair.difference.within_noise]
    if not same:
        return [f"All {number(len(comparisons), 'pair')} of methods differ by more than noise (95 % intervals)."]
    listed = ", ".join(same[:LISTED]) + (f" and {len(same) - LISTED} more" if len(same) > LISTED else "")
    return [
        f"Within noise (95 % interval holds 0): {len(same)} of {number(len(comparisons), 'pair')} of methods: {listed}."
    ]


def _seeds(tables: BackboneTables) -> list[str]:
    single = sum(cell.summary.n == 1 for cell in tables.scores.values())
    if not single:
        return []
    return [f"{single} of {number(len(tables.scores), 'score')} come from one seed, whose spread is not known."]


def _weak(tables: BackboneTables) -> list[str]:
    """Methods and tasks on which nothing was learned beyond the commonest answer, tasks with the same methods together."""
    methods = [line.method for line in tables.lines]
    groups: dict[tuple[str, ...], list[str]] = {}
    for task in tables.tasks:
        cells = {method: tables.scores.get((method, task)) for method in methods}
        over = {method: cell.over_majority for method, cell in cells.items() if cell and cell.over_majority is not None}
        weak = tuple(method for method in over if over[method] <= 0)
        if weak:
            groups.setdefault(weak if len(weak) < len(methods) else ("every method",), []).append(task)
    if not groups:
        return []
    parts = [f"{', '.join(weak)} on {', '.join(tasks)}" for weak, tasks in groups.items()]
    return [f"No better than always answering the commonest class: {'; '.join(parts)}."]


def hardware(results: Results) -> str:
    """The machines of the runs."""
    found = dict.fromkeys(_machine(environment) for environment in results.environments.values())
    return "; ".join(found) or NOTHING


def _machine(environment: Mapping[str, Any]) -> str:
    parts = [environment.get("gpu"), environment.get("cpu"), f"{environment.get('cores')} cores"]
    return ", ".join(str(part) for part in parts if part) + f", {environment.get('threads')} thread(s) a run"


def versions(results: Results) -> str:
    """The software of the runs."""
    names = ("deltatune", "torch", "transformers", "python")
    found = dict.fromkeys(
        ", ".join(f"{name} {environment.get(name)}" for name in names if environment.get(name))
        for environment in results.environments.values()
    )
    return "; ".join(found) or NOTHING


def code(results: Results) -> str:
    """The commit of the runs, and whether the code differed from it."""
    found = dict.fromkeys(
        (environment.get("git"), environment.get("dirty")) for environment in results.environments.values()
    )
    return "; ".join(_commit(commit, dirty) for commit, dirty in found) or NOTHING


def _commit(commit: str | None, dirty: bool | None) -> str:
    if not commit:
        return "not under version control"
    state = {True: " with uncommitted changes", False: ", clean", None: ", unknown whether changed"}
    return f"commit {commit[:12]}{state[dirty]}"
