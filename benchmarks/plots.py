"""Figures of benchmarks as values, drawn with what draws the report of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltatune.study import plots
from deltatune.study.figures import Panel
from deltatune.study.palette import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMIT = "frozen-backbone limit"  # grey wherever it is drawn
Spread = Mapping[str, float]  # median, low, high


@dataclass(frozen=True)
class Bars:
    """One bar a contestant, with its value and unit at its end."""

    title: str
    values: Mapping[str, float]
    unit: str = ""
    digits: int = 2

    @property
    def names(self) -> list[str]:
        """The contestants, the first on top."""
        return list(self.values)

    def panel(self) -> Panel:
        """What draws it."""
        return Panel(self.title, self.title, (4.6, 0.9 + 0.32 * len(self.values)), self._draw)

    def _draw(self, axes: Axes, look: Palette) -> None:
        texts = [f"{value:.{self.digits}f}{self.unit}" for value in self.values.values()]
        plots.bars(axes, self.names, look, list(self.values.values()), texts, self.title)


@dataclass(frozen=True)
class Curves:
    """One line a contestant through points (x, spread), the quartiles as a band; x is drawn in equal ratios."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, Spread]]]

    @property
    def names(self) -> list[str]:
        """The contestants."""
        return list(self.lines)

    def panel(self) -> Panel:
        """What draws it."""
        return Panel(self.title, f"{self.title}: {self.y} against {self.x}", (4.2, 3.0), self._draw)

    def _draw(self, axes: Axes, look: Palette) -> None:
        axes.set_xscale("log", base=2)
        for name, points in self.lines.items():
            at = [x for x, _ in points]
            low, high = ([spread[end] for _, spread in points] for end in ("low", "high"))
            axes.fill_between(at, low, high, color=look.color(name), alpha=0.2, linewidth=0)
            plots.curve_of(axes, name, look, at, [spread["median"] for _, spread in points])
        ticks = sorted({x for points in self.lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(self.x)
        axes.set_ylabel(self.y)
        axes.legend(fontsize=8, frameon=False)
        plots.title(axes, self.title)


Plot = Bars | Curves


def same(value: float) -> dict[str, float]:
    """Return what has no spread (a number of bytes) as a spread."""
    return dict.fromkeys(("median", "low", "high"), value)


def look_of(figures: Sequence[Plot], theme: Any) -> Palette:
    """Return the colours of one benchmark's figures: a contestant has the same in all of them."""
    names = tuple(dict.fromkeys(name for figure in figures for name in figure.names))
    return Palette(names, LIMIT if LIMIT in names else None, theme)
