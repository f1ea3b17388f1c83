"""Figures as pictures: SVG panels that take the colours of the page they stand in, and PNG files for elsewhere."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from deltatune.study import plots, words
from deltatune.study.analyses import BackboneTables
from deltatune.study.palette import SCREEN_VARIABLES, Palette, Theme
from deltatune.study.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEGABYTE = 1e6


@dataclass(frozen=True)
class Panel:
    """One axes to draw: its size in inches and what draws it in given colours."""

    name: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Axes, Palette], None]


def panels(results: Results, tables: BackboneTables) -> dict[str, list[Panel]]:
    """The panels of one backbone by figure: score, ranks, convergence, costs; figures without data are left out."""
    shown: dict[str, list[Panel]] = {}
    if tables.common:
        text = "Average test score against the number of trained parameters, one point a method"
        shown["score"] = [Panel("score", text, (5.0, 3.7), partial(_score, tables))]
    if tables.ranks:
        text = "Rank of each method on each task, and its mean"
        height = 1.5 + 0.4 * len(tables.ranked)
        shown["ranks"] = [Panel("ranks", text, (5.0, max(height, 3.7)), partial(_ranks, tables))]
    records = [record for record in results.final if record.backbone == tables.backbone]
    tasks = [task for task in tables.tasks if any(record.task == task and record.curve for record in records)]
    if tasks:
        shown["convergence"] = [
            Panel(task, f"Dev score against training step on {task}", (3.5, 2.5), partial(_convergence, records, task))
            for task in tasks
        ]
    if tables.lines:
        shown["costs"] = list(_costs(tables))
    return shown


def _score(tables: BackboneTables, axes: Axes, look: Palette) -> None:
    plots.score_parameters(axes, tables, look)


def _ranks(tables: BackboneTables, axes: Axes, look: Palette) -> None:
    plots.ranks(axes, tables, look)


def _convergence(records: Sequence[Any], task: str, axes: Axes, look: Palette) -> None:
    plots.convergence(axes, records, task, look)


def _costs(tables: BackboneTables) -> Sequence[Panel]:
    height = 0.9 + 0.32 * len(tables.lines)
    times = [line.step_seconds or 0.0 for line in tables.lines]
    memory = [line.peak_memory_bytes for line in tables.lines]
    files = [line.file_bytes for line in tables.lines]
    costs = [
        ("Time of a training step, s", times, [words.seconds(value) for value in times]),
        ("Peak memory, MB", [value / MEGABYTE for value in memory], [words.size(value) for value in memory]),
        ("Saved delta, MB", [value / MEGABYTE for value in files], [words.size(value) for value in files]),
    ]
    return [
        Panel(name, name, (3.7, height), partial(_bars, tables, values, texts, name)) for name, values, texts in costs
    ]


def _bars(
    tables: BackboneTables, values: Sequence[float], texts: Sequence[str], name: str, axes: Axes, look: Palette
) -> None:
    plots.bars(axes, [line.method for line in tables.lines], look, values, texts, name)


def svg(panel: Panel, look: Palette, prefix: str) -> str:
    """The panel as an <svg> element without any outside reference; `prefix` keeps its ids apart from other panels'."""
    with _style(look.theme):
        figure = _figure(panel.size)
        panel.draw(_axes(figure, look.theme, [1, 1])[0], look)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _inline(file.getvalue(), panel.caption, prefix)


def png(group: Sequence[Panel], look: Palette) -> bytes:
    """The panels side by side and below each other, as a PNG on white; several curves share one legend."""
    columns = min(len(group), 3 if len(group) != 4 else 2)
    rows = math.ceil(len(group) / columns)
    width, height = group[0].size
    with _style(look.theme):
        figure = _figure((width * columns, height * rows))
        grid = _axes(figure, look.theme, [rows, columns])
        for panel, axes in zip(group, grid, strict=False):
            panel.draw(axes, look)
        for axes in grid[len(group) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def _style(theme: Theme) -> Any:
    import matplotlib

    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return matplotlib.rc_context(
        {
            **dict.fromkeys(names, theme.ink),
            "grid.color": theme.grid,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "font.size": 10,
            "svg.fonttype": "none",
            # A fixed salt makes equal figures equal files.
            "svg.hashsalt": "deltatune",
        }
    )


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, theme: Theme, shape: Sequence[int]) -> list[Axes]:
    grid = figure.subplots(*shape, squeeze=False).ravel().tolist()
    for axes in grid:
        axes.grid(True, linewidth=0.7, color=theme.grid)
        axes.set_axisbelow(True)
    return grid


def _inline(text: str, caption: str, prefix: str) -> str:
    """Turn a whole SVG file into an element of an HTML page: no prolog, namespaces or metadata, own ids, page colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text).replace("> <", "><")
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    for stand_in, variable in SCREEN_VARIABLES.items():
        text = text.replace(stand_in, variable)
    label = caption.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', text, count=1)
