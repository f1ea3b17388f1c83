"""The report of a study: a pure function of its directory, or of the results.json of an earlier report."""

from __future__ import annotations

from pathlib import Path

from deltatune.files import write_bytes, write_text
from deltatune.study.analyses import BackboneTables, tables
from deltatune.study.collect import read
from deltatune.study.figures import panels, png
from deltatune.study.page import Section, html, markdown, table
from deltatune.study.palette import PRINT, Palette
from deltatune.study.results import Results, to_json
from deltatune.study.theory import instruments, theory_panels


def report(source: Path | str, out: Path | str) -> Path:
    """Write report.html, report.md, results.csv, results.json and figures/*.png into `out`; return the page's path.

    Equal sources give equal files. Raises `DeltaTuneError` when `source` is neither a study nor a results.json.
    """
    results, out = read(source), Path(out)
    found = [tables(results, backbone) for backbone in results.backbones]
    sections = [_section(results, each) for each in found]
    look = Palette(tuple(results.methods), results.baseline, PRINT)
    write_text(out / "results.json", to_json(results))
    write_text(out / "results.csv", table(results))
    for section in sections:
        for figure, group in section.panels.items():
            write_bytes(out / "figures" / f"{figure}-{section.slug}.png", png(group, look))
    write_text(out / "report.md", markdown(results, sections))
    write_text(out / "report.html", html(results, sections))
    return out / "report.html"


def _section(results: Results, tables: BackboneTables) -> Section:
    measured = instruments(results, tables)
    return Section(tables, {**panels(results, tables), **theory_panels(measured)}, measured)
