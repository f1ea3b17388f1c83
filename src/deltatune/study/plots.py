"""The figures of a report, each drawn on one axes, so that the page can show panels and a file a grid of them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from deltatune.study.analyses import BackboneTables, MethodLine
from deltatune.study.palette import Palette
from deltatune.study.results import Record
from deltatune.study.words import count, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

# Size of a panel's title in points, and the number of letters that fit at this size.
TITLE, TITLE_LETTERS = 11, 34
# Where a label may stand beside its point: offset in points, horizontal and vertical alignment.
PLACES = (
    ((9, 0), "left", "center"),
    ((-9, 0), "right", "center"),
    ((0, 9), "center", "bottom"),
    ((0, -9), "center", "top"),
    ((8, 8), "left", "bottom"),
    ((8, -8), "left", "top"),
    ((-8, 8), "right", "bottom"),
    ((-8, -8), "right", "top"),
)


def score_parameters(axes: Axes, tables: BackboneTables, palette: Palette) -> None:
    """Average test score against trained parameters (log), one point a method, bars of one standard error over seeds."""
    lines = [line for line in tables.lines if line.average is not None]
    axes.set_xscale("log")
    for line in lines:
        point, color = (line.parameters, line.average or 0.0), palette.color(line.method)
        if line.error:
            axes.errorbar(*point, yerr=line.error, fmt="none", ecolor=color, elinewidth=1.4, capsize=3)
        axes.plot(*point, palette.marker(line.method), color=color, markersize=8, markeredgecolor=palette.theme.paper)
    axes.margins(x=0.22, y=0.16)
    axes.xaxis.set_major_formatter(lambda value, _: count(value))
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(f"test score, mean of {number(len(tables.common), 'task')}")
    _label(axes, lines, palette)


def _label(axes: Axes, lines: Sequence[MethodLine], palette: Palette) -> None:
    """Write each method's name beside its point, where it hides least of the points and of the other names."""
    renderer = axes.figure.canvas.get_renderer()  # pyright: ignore
    axes.figure.draw_without_rendering()  # pyright: ignore
    points = [axes.transData.transform((line.parameters, line.average or 0.0)) for line in lines]
    taken: list[Bbox] = []
    for line in lines:
        texts = [
            axes.annotate(
                line.method, (line.parameters, line.average or 0.0), xytext=offset, textcoords="offset points",
                ha=ha, va=va, fontsize=10, color=palette.color(line.method), fontweight="bold",
            )
            for offset, ha, va in PLACES
        ]  # fmt: skip
        boxes = [text.get_window_extent(renderer) for text in texts]
        cost = [
            4 * sum(box.overlaps(other) for other in taken)
            + 2 * sum(box.contains(x, y) for x, y in points)
            + 3 * (not (axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)))
            for box in boxes
        ]
        best = cost.index(min(cost))
        taken.append(boxes[best])
        for place, text in enumerate(texts):
            if place != best:
                text.remove()


def convergence(axes: Axes, records: Sequence[Record], task: str, palette: Palette) -> None:
    """Dev score against step on one task: the mean over seeds as a line, the single seeds behind it."""
    for method in palette.methods:
        curves = [
            {step: dev for step, dev in record.curve}
            for record in records
            if (record.method, record.task) == (method, task) and record.curve
        ]
        if not curves:
            continue
        color = palette.color(method)
        for curve in curves if len(curves) > 1 else []:
            axes.plot(list(curve), list(curve.values()), color=color, linewidth=0.8, alpha=0.35)
        steps = sorted(set.intersection(*map(set, curves)))
        means = [fmean(curve[step] for curve in curves) for step in steps]
        curve_of(axes, method, palette, steps, means)
    title(axes, task)
    axes.set_xlabel("step")
    axes.set_ylabel("dev score")


def curve_of(axes: Axes, method: str, palette: Palette, at: Sequence[float], values: Sequence[float]) -> None:
    """A method's values as a line with its marks."""
    axes.plot(
        at, values, color=palette.color(method), linewidth=1.8, marker=palette.marker(method), markersize=5,
        markeredgecolor=palette.theme.paper, markeredgewidth=0.6, label=method,
    )  # fmt: skip


def title(axes: Axes, text: str) -> None:
    """A panel's title, smaller where it is long."""
    axes.set_title(text, loc="left", fontsize=min(TITLE, TITLE * TITLE_LETTERS / len(text)))


def ranks(axes: Axes, tables: BackboneTables, palette: Palette) -> None:
    """The rank of each method on each task (small) and its mean (large), with the critical difference as a bar."""
    if tables.ranks is None:
        return
    order = sorted(range(len(tables.ranked)), key=lambda index: tables.ranks.mean[index])  # pyright: ignore
    names = [tables.ranked[index] for index in order]
    for row, index in enumerate(order):
        color, marker = palette.color(tables.ranked[index]), palette.marker(tables.ranked[index])
        values = [ranked[index] for ranked in tables.ranks.by_task]
        for rank in sorted(set(values)):
            spread = [row + 0.13 * (place - (values.count(rank) - 1) / 2) for place in range(values.count(rank))]
            axes.plot([rank] * len(spread), spread, "o", color=color, markersize=3.5, alpha=0.55, markeredgewidth=0)
        axes.plot(
            tables.ranks.mean[index], row, marker, color=color, markersize=10, markeredgecolor=palette.theme.paper
        )
    axes.set_yticks(
        range(len(names)), [f"{name}  {tables.ranks.mean[index]:.1f}" for name, index in zip(names, order, strict=True)]
    )
    axes.set_ylim(len(names) - 0.4, -1.3 if tables.ranks.critical else -0.7)
    axes.set_xlim(0.6, len(names) + 0.4)
    axes.set_xticks(range(1, len(names) + 1))
    axes.set_xlabel(f"rank on {number(len(tables.common), 'task')}, 1 is best")
    if tables.ranks.critical:
        end = min(1 + tables.ranks.critical, len(names) + 0.35)
        axes.plot([1, end], [-0.85, -0.85], color=palette.theme.ink, linewidth=2)
        axes.annotate("critical difference", (1, -0.95), fontsize=9, color=palette.theme.ink, va="bottom")


def bars(
    axes: Axes, names: Sequence[str], palette: Palette, values: Sequence[float], texts: Sequence[str], heading: str
) -> None:
    """One bar a method, the first on top, with its value as text at its end."""
    axes.barh(names, values, color=[palette.color(name) for name in names], height=0.66)
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.annotate(
            text, (value, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9,
            color=palette.theme.ink,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.24)
    title(axes, heading)
