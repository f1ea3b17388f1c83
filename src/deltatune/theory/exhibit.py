"""What an instrument shows: tables, plots, and its findings, as a value that is also JSON.

A chart holds numbers and words, no looks: the command line and the report of a study draw it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltatune.theory.finding import Finding, plain

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under the names of their columns; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Lines:
    """Lines of (x, y) by their names; `log` names the logarithmic axes, `ticks` the whole numbers of x, `level` a horizontal line."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float | None]]]
    log: str = ""
    ticks: tuple[str, ...] = ()
    level: float | None = None


@dataclass(frozen=True)
class Surface:
    """A height values[i][j] at x = at[i], y = at[j]."""

    title: str
    x: str
    y: str
    at: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Exhibit:
    """What one instrument found: by name what it looked at, its findings, the chief one first, its tables and its charts.

    `profiles` are the numbers that a study compares between methods, by quantity and then by place; `notes` say what was
    left out and why.
    """

    instrument: str
    about: Mapping[str, str]
    findings: Sequence[Finding]
    tables: Sequence[Table]
    charts: Sequence[Lines | Surface]
    profiles: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def finding(self) -> str:
        """The chief finding, one sentence."""
        return self.findings[0].finding

    def to_json(self) -> dict[str, Any]:
        """Return all as plain values; each finding says its own name and sentence."""
        return {
            "instrument": self.instrument,
            "finding": self.finding,
            "about": dict(self.about),
            "notes": list(self.notes),
            **{name: plain(vars(self)[name]) for name in ("tables", "charts", "profiles")},
            "findings": [found.to_json() for found in self.findings],
        }


def by_place(title: str, y: str, series: Mapping[str, Mapping[str, float | None]], log: str = "") -> Lines:
    """Return the lines of values at named places, in the order in which the places come first."""
    places = tuple(dict.fromkeys(place for values in series.values() for place in values))
    lines = {name: [(places.index(place), value) for place, value in v.items()] for name, v in series.items()}
    return Lines(title, "", y, lines, log, places)
