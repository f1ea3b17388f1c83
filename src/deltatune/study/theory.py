"""What the instruments of `deltatune.theory` found in a study's runs: means by place and method, and their sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from deltatune.study.analyses import BackboneTables
from deltatune.study.charts import name_ticks
from deltatune.study.figures import Panel
from deltatune.study.palette import Palette
from deltatune.study.plots import curve_of, title
from deltatune.study.results import Measured, Record, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = 30.0  # a quantity whose largest value is so many times its least is drawn on a logarithmic axis
SIZE = (5.0, 3.7)


@dataclass(frozen=True)
class Quantity:
    """One number at each place of each method, `values[place, method]`: the mean over the method's measured runs."""

    name: str
    places: tuple[str, ...]
    methods: tuple[str, ...]
    values: Mapping[tuple[str, str], float]

    def line(self, method: str) -> list[tuple[int, float]]:
        """The places' numbers and values of a method, where there are any."""
        known = [(x, self.values.get((place, method))) for x, place in enumerate(self.places)]
        return [(x, y) for x, y in known if y is not None]


@dataclass(frozen=True)
class Instrument:
    """What one instrument found on one backbone: its quantities, each run's sentence, and the methods that it refused, and why."""

    name: str
    quantities: tuple[Quantity, ...]
    findings: tuple[tuple[Record, str], ...]
    refusals: Mapping[str, str]

    @property
    def first(self) -> list[tuple[Record, str]]:
        """One sentence a method, that of its first run."""
        by_method: dict[str, tuple[Record, str]] = {}
        for record, finding in self.findings:
            by_method.setdefault(record.method, (record, finding))
        return list(by_method.values())


def instruments(results: Results, tables: BackboneTables) -> list[Instrument]:
    """What each instrument found in the final runs on one backbone, in the order of the plan."""
    records = {record.id: record for record in results.final if record.backbone == tables.backbone}
    groups: dict[str, list[tuple[Record, Measured]]] = {}
    for measured in results.theory:
        if measured.id in records:
            groups.setdefault(measured.instrument, []).append((records[measured.id], measured))
    return [_instrument(name, found) for name, found in groups.items()]


def _instrument(name: str, found: Sequence[tuple[Record, Measured]]) -> Instrument:
    kept = [(record, measured) for record, measured in found if not measured.refused]
    names = dict.fromkeys(quantity for _, measured in kept for quantity in measured.profiles)
    return Instrument(
        name,
        tuple(_quantity(quantity, kept) for quantity in names),
        tuple((record, measured.finding) for record, measured in kept),
        {record.method: measured.refused for record, measured in found if measured.refused},
    )


def _quantity(name: str, found: Sequence[tuple[Record, Measured]]) -> Quantity:
    values: dict[tuple[str, str], list[float]] = {}
    for record, measured in found:
        for place, value in measured.profiles.get(name, {}).items():
            if value is not None:
                values.setdefault((place, record.method), []).append(value)
    # The run with most places knows their order: a method that acts at few of them does not.
    profiles = sorted((measured.profiles.get(name, {}) for _, measured in found), key=len, reverse=True)
    places = tuple(dict.fromkeys(place for profile in profiles for place in profile))
    methods = tuple(dict.fromkeys(method for _, method in values))
    return Quantity(name, places, methods, {key: fmean(each) for key, each in values.items()})


def theory_panels(found: Sequence[Instrument]) -> dict[str, list[Panel]]:
    """One plot for each quantity of each instrument, a line a method."""
    panels = {each.name: [_panel(quantity) for quantity in each.quantities if quantity.values] for each in found}
    return {f"theory-{name}": group for name, group in panels.items() if group}


def _panel(quantity: Quantity) -> Panel:
    heading = quantity.name[:1].upper() + quantity.name[1:]
    return Panel(quantity.name, heading, SIZE, partial(_lines, quantity, heading))


def _lines(quantity: Quantity, heading: str, axes: Axes, look: Palette) -> None:
    for method in (method for method in look.methods if method in quantity.methods):
        xs, ys = zip(*quantity.line(method), strict=True)
        curve_of(axes, method, look, xs, ys)
    values = quantity.values.values()
    if min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
    name_ticks(axes, quantity.places)
    title(axes, heading)
