"""The report as text: one self-contained HTML page, and the same tables in Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deltatune.study import words
from deltatune.study.analyses import BackboneTables, Comparison
from deltatune.study.figures import Panel, svg
from deltatune.study.palette import DARK, LIGHT, SCREEN, Palette
from deltatune.study.results import Choice, Record, Results
from deltatune.study.theory import Instrument

COLUMNS_LEFT_OUT = ("recipe", "curve", "loss", "items", "item_ids")


@dataclass(frozen=True)
class Section:
    """One backbone of the report: its tables, the panels of its figures, and what instruments found in its runs."""

    tables: BackboneTables
    panels: Mapping[str, Sequence[Panel]]
    theory: Sequence[Instrument] = ()

    @property
    def slug(self) -> str:
        """The backbone's name as a part of ids and file names."""
        return slug(self.tables.backbone)


def slug(name: str) -> str:
    """A name made of letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")


def html(results: Results, sections: Sequence[Section]) -> str:
    """The page: styles, figures and data inside, no reference to anything outside."""
    look = Palette(tuple(results.methods), results.baseline, SCREEN)
    pictures = {
        (section.slug, figure): [
            svg(panel, look, f"{section.slug}-{figure}-{index}") for index, panel in enumerate(group)
        ]
        for section in sections
        for figure, group in section.panels.items()
    }
    return (
        environment(escape=True).get_template("report.html.j2").render(**_context(results, sections), pictures=pictures)
    )


def markdown(results: Results, sections: Sequence[Section]) -> str:
    """The tables in Markdown, with the figures as files beside it."""
    text = environment(escape=False).get_template("report.md.j2").render(**_context(results, sections))
    return re.sub(r"\n{3,}", "\n\n", text)


def table(results: Results) -> str:
    """One line a run in CSV, all that is a single value."""
    names = [field.name for field in fields(Record) if field.name not in COLUMNS_LEFT_OUT]
    recipe = sorted({key for record in results.records for key in record.recipe})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, *(f"recipe.{key}" for key in recipe)])
    for record in results.records:
        values = vars(record)
        writer.writerow([*(values[name] for name in names), *(record.recipe.get(key) for key in recipe)])
    return file.getvalue()


def _context(results: Results, sections: Sequence[Section]) -> dict[str, Any]:
    return {
        "results": results,
        "sections": sections,
        "facts": {
            "Hardware": words.hardware(results),
            "Versions": words.versions(results),
            "Code": words.code(results),
        },
        "records": unique(results),
        "failed": [gap for gap in results.gaps if gap.state == "failed"],
        "waiting": [gap for gap in results.gaps if gap.state != "failed" and gap.part == "final"],
        "look": Palette(tuple(results.methods), results.baseline, SCREEN),
        "words": words,
        "best": _best,
        "scale": _scale,
        "spark": _spark,
        "by_category": _by_category,
        "at_edge": _at_edge,
    }


def unique(results: Results) -> list[Record]:
    """Each run once, in the order of the tables: a run that was also a candidate of the search counts as final."""
    methods, tasks, backbones = (list(names) for names in (results.methods, results.tasks, results.backbones))
    records = {record.id: record for record in [*results.search, *results.final]}
    return sorted(
        records.values(),
        key=lambda r: (
            r.part != "final",
            backbones.index(r.backbone),
            tasks.index(r.task),
            methods.index(r.method),
            r.recipe["lr"] if r.part == "search" else 0.0,
            r.seed,
        ),
    )


def _by_category(results: Results, tables: BackboneTables) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for task in tables.tasks:
        groups.setdefault(results.category(task), []).append(task)
    return groups


def _at_edge(choice: Choice) -> bool:
    """True when the rate that was taken is the lowest or the highest tried, so that a better one may lie outside."""
    rates = [rate for rate, _, _ in choice.candidates]
    return len(rates) > 1 and choice.chosen in (min(rates), max(rates))


def _best(tables: BackboneTables, task: str) -> float | None:
    """The best mean score on a task."""
    means = [cell.summary.mean for (_, name), cell in tables.scores.items() if name == task]
    return max(means, default=None)


def _scale(comparisons: Sequence[Comparison]) -> Callable[[float], float]:
    """Where a difference lies on a line from 0 to 100 that holds 0 and every interval."""
    ends = [end for pair in comparisons for end in (pair.difference.low, pair.difference.high) if end is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return lambda value: round(2 + 96 * (value - low) / (high - low or 1.0), 2)


def _spark(points: Sequence[Sequence[float]], width: int = 120, height: int = 28) -> str:
    """The points of a small line through (step, value) pairs, scaled to a box."""
    if len(points) < 2:
        return ""
    steps, values = zip(*points, strict=True)
    low, span = min(values), max(values) - min(values) or 1.0
    reach = steps[-1] - steps[0] or 1
    return " ".join(
        f"{width * (step - steps[0]) / reach:.1f},{height - 2 - (height - 4) * (value - low) / span:.1f}"
        for step, value in points
    )


def _breakable(name: str) -> Any:
    """A name as HTML that may be broken into lines after its underscores and slashes."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([_/])", r"\1<wbr>", str(escape(name))))


def environment(escape: bool, *folders: Path) -> Any:
    """What renders templates, those of a report and those in other folders, which may extend `page.html.j2`."""
    import jinja2

    own = jinja2.PackageLoader("deltatune.study", "templates")
    loader = jinja2.ChoiceLoader([own, *(jinja2.FileSystemLoader(folder) for folder in folders)])
    made = jinja2.Environment(
        loader=loader, autoescape=escape, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    names = ("score", "signed", "count", "size", "percent", "seconds", "p_value", "number", "short")
    made.globals["colors"] = list(zip(LIGHT, DARK, strict=True))
    made.filters.update({name: vars(words)[name] for name in names}, slug=slug, breakable=_breakable)
    return made
