"""What a benchmark is: a value in a file of its own, which everything else finds by itself."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import benchmarks
from benchmarks.measure import settle
from benchmarks.plots import Plot
from benchmarks.shape import Shape
from deltatune.quiet import quiet
from deltatune.tuning.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
SCRATCH = Path(__file__).resolve().parents[1] / "build" / "benchmarks"
Result = dict[str, Any]
S = TypeVar("S", bound=Shape)


@dataclass(frozen=True)
class Table:
    """A table for people: a title, column names, and rows of text; the first column is words, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """Return the table as Markdown, numbers to the right."""
        rule = ["---", *("---:" for _ in self.columns[1:])]
        lines = [" | ".join(cells) for cells in (self.columns, rule, *self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


def _no_plots(result: Result) -> list[Plot]:
    return []


@dataclass(frozen=True)
class Benchmark(Generic[S]):
    """One file's benchmark: its shapes, what measures one of them, and what shows its result; `gpu` is the full one there.

    `measure` returns what it measured as JSON; `tables` and `plots` are functions of the whole result alone, so that a page
    can be made from a file. The name is the file's; title and explanation are its docstring's first paragraph and the rest.
    """

    full: S
    quick: S
    measure: Callable[[S], Result]
    tables: Callable[[Result], list[Table]]
    plots: Callable[[Result], list[Plot]] = _no_plots
    gpu: S | None = None

    @property
    def module(self) -> ModuleType:
        """The file that it stands in."""
        return sys.modules[self.measure.__module__]

    @property
    def name(self) -> str:
        """The name of its file."""
        return self.module.__name__.rpartition(".")[2]

    @property
    def title(self) -> str:
        """What it measures, in one line."""
        return self._paragraphs()[0].replace("\n", " ").removesuffix(".")

    @property
    def about(self) -> list[str]:
        """How it measures and how its figures are to be read, paragraph by paragraph."""
        return self._paragraphs()[1:]

    def _paragraphs(self) -> list[str]:
        return [paragraph.strip() for paragraph in (self.module.__doc__ or "").strip().split("\n\n")]

    def shape(self, quick: bool, device: str) -> S:
        """Return what is measured on a device."""
        full = self.gpu if self.gpu is not None and device == "cuda" else self.full
        return replace(self.quick if quick else full, device=device)

    def run(self, quick: bool, device: str) -> Result:
        """Measure and return the result; the state of the machine is taken down first."""
        settle()
        warnings.filterwarnings("ignore", module=r"peft|transformers")
        quiet()
        shape, at = self.shape(quick, device), machine()
        common = {"quick": quick, "device": device, "rounds": shape.rounds, "machine": at, "shape": shape.sizes()}
        return {**common, **self.measure(shape)}


def find(name: str) -> Benchmark[Any] | None:
    """Return the benchmark in a file of this package, or None where there is none."""
    value = vars(importlib.import_module(f"{benchmarks.__name__}.{name}")).get("BENCHMARK")
    return value if isinstance(value, Benchmark) else None


def all_benchmarks() -> dict[str, Benchmark[Any]]:
    """Return every benchmark by its name, in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.ispkg)
    found = {name: find(name) for name in names if name != "__main__"}
    return {name: benchmark for name, benchmark in found.items() if benchmark is not None}


def machine() -> dict[str, Any]:
    """State where this is measured: versions, commit, processor, threads, and the load of the last minute."""
    return {**environment(), "peft": importlib.metadata.version("peft"), "load": round(os.getloadavg()[0], 2)}
