"""Results for people: a page with plots for each device, and the tables of docs/performance.md.

    python -m benchmarks.page [--out FOLDER]

A page is a function of the results beside it and of the benchmarks' own `tables` and `plots`; nothing is measured.
"""

from __future__ import annotations

import argparse
import re
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as TerminalTable

from benchmarks.benchmark import RESULTS, Benchmark, Table, all_benchmarks
from benchmarks.plots import look_of
from benchmarks.store import files, read, statement
from deltatune.files import write_text
from deltatune.study.figures import svg
from deltatune.study.page import environment
from deltatune.study.palette import SCREEN

TEMPLATES = Path(__file__).resolve().parent / "templates"
DOCS = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- from here on: python -m benchmarks.page -->", "<!-- up to here -->"
DEVICES = {"cpu": "On a CPU", "cuda": "On a GPU"}
WIDTH = 110  # of a table, where the terminal does not say or is narrower


def show_on_terminal(benchmark: Benchmark[Any], result: dict[str, Any]) -> None:
    """Print the tables of a result."""
    console = Console(width=max(WIDTH, Console().width))
    for table in benchmark.tables(result):
        shown = TerminalTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def pages(folder: Path) -> list[Path]:
    """Write one page with plots for each file of results in a folder; returns where they are."""
    written = []
    for path in files(folder):
        write_text(path.with_suffix(".html"), html(path))
        written.append(path.with_suffix(".html"))
    return written


def html(path: Path) -> str:
    """Return the page of one file of results: styles and figures inside, no reference to anything outside."""
    found = read(path)
    sections = [_section(b, found[name]) for name, b in all_benchmarks().items() if name in found]
    template = environment(True, TEMPLATES).get_template("benchmarks.html.j2")
    return template.render(title=DEVICES.get(path.stem, path.stem), sections=sections)


def _section(benchmark: Benchmark[Any], result: dict[str, Any]) -> dict[str, Any]:
    figures = benchmark.plots(result)
    look = look_of(figures, SCREEN)
    return {
        "benchmark": benchmark,
        "about": [_prose(paragraph) for paragraph in benchmark.about],
        "tables": benchmark.tables(result),
        "statement": statement(result),
        "figures": [svg(each.panel(), look, f"{benchmark.name}-{index}") for index, each in enumerate(figures)],
    }


def _prose(paragraph: str) -> str:
    """Return a paragraph as HTML, code in it as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(paragraph))


def document(docs: Path, folder: Path) -> Path:
    """Write what the benchmarks say of themselves and their tables into a document, between its marks; returns where."""
    text = docs.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(docs, f"{before}{BEGIN}\n\n{generated(folder)}\n{END}{after}")
    return docs


def generated(folder: Path) -> str:
    """Return the sections of all benchmarks as Markdown: what each measures, and its tables on every device."""
    found = {path.stem: read(path) for path in files(folder)}
    return "\n".join(_markdown(benchmark, found) for benchmark in all_benchmarks().values())


def _markdown(benchmark: Benchmark[Any], found: dict[str, dict[str, Any]]) -> str:
    text = [
        f"## {benchmark.title}\n",
        f"`python -m benchmarks {benchmark.name}`\n",
        *(f"{p}\n" for p in benchmark.about),
    ]
    measured = {device: results[benchmark.name] for device, results in found.items() if benchmark.name in results}
    for device, result in measured.items():
        tables: list[Table] = benchmark.tables(result)
        text += [
            f"### {DEVICES.get(device, device)}\n",
            *(table.markdown() for table in tables),
            f"{statement(result)}\n",
        ]
    return "\n".join(text if measured else [*text, "Not measured yet.\n"])


def main() -> None:
    """Write the pages, and the document where the results are the committed ones."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description="Show what was measured.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    folder: Path = parser.parse_args().out.resolve()
    written = [*pages(folder), *([document(DOCS, folder)] if folder == RESULTS else [])]
    Console().print(*(f"written: {path}" for path in written), sep="\n")


if __name__ == "__main__":
    main()
