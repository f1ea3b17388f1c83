"""How far a study is: what is done, running, failed and still to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltatune.study.plan import Cell, Entry, Plan
from deltatune.study.store import Found, State, Store

if TYPE_CHECKING:
    from deltatune.tuning import Run


@dataclass(frozen=True)
class Line:
    """A run of the study, its state, and what the directory holds about it."""

    entry: Entry
    state: State
    found: Found | None

    @property
    def reason(self) -> str:
        """Why the run failed, or is not done though it is trained, in one line; else empty."""
        if self.found and self.found.failure:
            return f"{self.found.failure['error']}: {self.found.failure['message']}"
        return "trained, but not measured yet" if self.found and not self.found.measured else ""


@dataclass(frozen=True)
class Status:
    """The state of a study; `undecided` are final runs whose learning rate the search has not found."""

    name: str
    folder: Path
    lines: tuple[Line, ...]
    undecided: tuple[Cell, ...]

    @property
    def counts(self) -> Counter[State]:
        """How many runs are in each state; the undecided ones are pending."""
        return sum(self.by_method().values(), Counter())

    def by_method(self) -> dict[str, Counter[State]]:
        """How many runs of each method are in each state."""
        counts: dict[str, Counter[State]] = {}
        for line in self.lines:
            counts.setdefault(line.entry.method, Counter())[line.state] += 1
        for cell in self.undecided:
            counts.setdefault(cell.method, Counter())["pending"] += 1
        return counts

    @property
    def failures(self) -> list[Line]:
        """The failed runs that leave a gap in the tables; a candidate that fails in a search only loses the search."""
        return [
            line for line in self.lines if line.state == "failed" and (line.entry.part == "final" or self.undecided)
        ]

    @property
    def complete(self) -> bool:
        """True when every run of the plan is done, but for candidates that lost a search by failing."""
        return not self.undecided and all(
            line.state == "done" or (line.state == "failed" and line.entry.part == "search") for line in self.lines
        )


def status(folder: Path | str) -> Status:
    """The state of the study in a directory, whether or not a command works on it; needs neither data nor models."""
    plan = Store(folder).plan()
    return status_of(Store(folder, plan.theory), plan)


def status_of(store: Store, plan: Plan) -> Status:
    """The state of a plan's runs in a directory."""
    found = store.found()
    dev = {run: each.dev for run, each in found.items() if each.settled}
    lines = tuple(_line(store, entry, found) for entry in plan.runs(dev))
    return Status(plan.name, store.folder, lines, tuple(plan.undecided(dev)))


def _line(store: Store, entry: Entry, found: Mapping[Run, Found]) -> Line:
    known = found.get(entry.run)
    return Line(entry, store.state(known.id) if known else "pending", known)
