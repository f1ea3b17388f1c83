"""The charts of an instrument of `deltatune.theory`, which come as plain values, drawn as panels in the look of a report.

lines: {title, x, y, series: {name: [[x, y], ...]}, log: which axes, ticks: [name of x = 0, ...], level}
surface: {title, x, y, at: [...], values: [[height at x = at[i], y = at[j]]]}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from deltatune.study.figures import Panel, svg
from deltatune.study.palette import SCREEN, Palette
from deltatune.study.plots import curve_of, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (5.0, 3.7)
LEVELS = 12
MARKED = 30  # points of a line that have marks, at most
MANY_TICKS, LONG_TICKS = 7, 30  # from here on the names of ticks stand upright


def pictures(charts: Sequence[Mapping[str, Any]], prefix: str) -> list[str]:
    """Return each chart as an <svg> element for a page, with its legend; a name has one colour in all of them."""
    names = dict.fromkeys(name for chart in charts for name in chart.get("series", ()))
    look = Palette(tuple(names), None, SCREEN)
    return [svg(panel(chart, legend=True), look, f"{prefix}-{index}") for index, chart in enumerate(charts)]


def panel(chart: Mapping[str, Any], legend: bool = False) -> Panel:
    """Return what draws a chart."""
    draw = partial(_lines, chart, legend) if "series" in chart else partial(_surface, chart)
    return Panel(chart["title"], chart["title"], SIZE, draw)


def _lines(chart: Mapping[str, Any], legend: bool, axes: Axes, look: Palette) -> None:
    for name, points in chart["series"].items():
        known = [(x, y) for x, y in points if y is not None]
        curve_of(axes, name, look, [x for x, _ in known], [y for _, y in known])
        if len(known) > MARKED:
            axes.lines[-1].set_marker("")
    if chart["level"] is not None:
        axes.axhline(chart["level"], color=look.theme.ink, linewidth=1.2, linestyle="--")
    axes.set_xscale("log" if "x" in chart["log"] else "linear")
    axes.set_yscale("log" if "y" in chart["log"] else "linear")
    name_ticks(axes, chart["ticks"])
    _words(axes, chart)
    if legend and len(chart["series"]) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=1 + (len(chart["series"]) > 6))


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Write names at 0, 1, ... of the horizontal axis, if there are any."""
    if names:
        upright = len(names) > MANY_TICKS or sum(map(len, names)) > LONG_TICKS
        axes.set_xticks(range(len(names)), names, rotation=90 if upright else 0, fontsize=8)


def _surface(chart: Mapping[str, Any], axes: Axes, look: Palette) -> None:
    # Few levels: a smooth colour bar would be stored as a picture, which the page could not take in.
    heights = list(zip(*chart["values"], strict=True))
    drawn = axes.contourf(chart["at"], chart["at"], heights, levels=LEVELS, cmap="viridis")
    axes.figure.colorbar(drawn, ax=axes)
    axes.plot(0, 0, "+", color=look.theme.paper, markersize=9)
    _words(axes, chart)


def _words(axes: Axes, chart: Mapping[str, Any]) -> None:
    title(axes, chart["title"])
    axes.set_xlabel(chart["x"])
    axes.set_ylabel(chart["y"])
