"""Panels of figures: their layout, lines and axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deltatune.study.palette import PRINT, Palette
from deltatune.study.words import count

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def save(
    folder: Path, name: str, panels: Sequence[tuple[str, Callable[[Axes], None]]], size: tuple[float, float]
) -> None:
    """Draw panels in rows of three, each of a size in inches, with one legend under them, and write them as PNG."""
    rows, columns = -(-len(panels) // 3), min(len(panels), 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        for place, (title, draw) in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            axes.set_title(title, loc="left", fontsize=10)
            axes.grid(color=PRINT.grid, linewidth=0.6)
            axes.set_axisbelow(True)
            draw(axes)
        known = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if known:
            figure.legend(
                known.values(),
                known.keys(),
                loc="outside lower center",
                ncols=min(len(known), 2 * columns),
                frameon=False,
            )
        figure.savefig(folder / f"{name}.png", dpi=100)


def line(
    axes: Axes, look: Palette, name: str, x: Sequence[Any], y: Sequence[float], error: Sequence[float] = ()
) -> None:
    """A named line with its marks, and bars of one standard deviation."""
    axes.errorbar(
        x, y, yerr=list(error) or None, color=look.color(name), marker=look.marker(name), markersize=4.5, linewidth=1.4,
        capsize=2, elinewidth=0.8, label=name,
    )  # fmt: skip


def counted(axes: Axes, values: Sequence[int], label: str) -> None:
    """A logarithmic axis with a mark at each value that there is."""
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(values, [count(value) for value in values])
    axes.set_xlabel(label)
