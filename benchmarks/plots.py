"""Figures of benchmarks as values, drawn with what draws the report of a study."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltatune.study import plots
from deltatune.study.figures import Panel
from deltatune.study.palette import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIMIT = "frozen-backbone limit"  # grey wherever it is drawn
LETTERS = 28  # of a bar's name in one line
Spread = Mapping[str, float]  # median, low, high


@dataclass(frozen=True)
class Bars:
    """One bar a contestant, with its value and unit at its end; `of` says whose colour each has, else all have one."""

    title: str
    values: Mapping[str, float]
    unit: str = ""
    digits: int = 2
    of: Mapping[str, str] = field(default_factory=dict)

    @property
    def coloured(self) -> list[str]:
        """What has a colour."""
        return [self.of.get(name, self.title) for name in self.values]

    def panel(self) -> Panel:
        """What draws it."""
        lines = sum(len(textwrap.wrap(name, LETTERS)) for name in self.values)
        return Panel(self.title, self.title, (5.2, 0.9 + 0.24 * lines), self._draw)

    def _draw(self, axes: Axes, look: Palette) -> None:
        of = dict(zip(self.values, self.coloured, strict=True))
        colours = _Shared(look.methods, look.baseline, look.theme, of)
        texts = [f"{value:.{self.digits}f}{self.unit}" for value in self.values.values()]
        plots.bars(axes, list(self.values), colours, list(self.values.values()), texts, self.title)
        axes.set_yticks(range(len(self.values)), [textwrap.fill(name, LETTERS) for name in self.values], fontsize=9)


@dataclass(frozen=True)
class _Shared(Palette):
    """Colours that several contestants share."""

    of: Mapping[str, str]

    def index(self, method: str) -> int:
        return super().index(self.of[method])


@dataclass(frozen=True)
class Curves:
    """One line a contestant through points (x, spread), the quartiles as a band; x is drawn in equal ratios."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, Spread]]]

    @property
    def coloured(self) -> list[str]:
        """What has a colour."""
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
        axes.ticklabel_format(axis="y", useOffset=False)
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
    names = tuple(dict.fromkeys(name for figure in figures for name in figure.coloured))
    return Palette(names, LIMIT if LIMIT in names else None, theme)
