"""Doing all runs of a study on all cores, so that a crash anywhere costs at most the steps since the last checkpoint."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from deltatune.study.crew import Crew, Worker, cores
from deltatune.study.display import Display
from deltatune.study.groups import run_groups
from deltatune.study.inputs import check_instruments, check_places, inspect
from deltatune.study.plan import Entry, Plan
from deltatune.study.status import Status, status_of
from deltatune.study.store import Store
from deltatune.study.worker import Execute, Measure

if TYPE_CHECKING:
    from deltatune.tuning import Run

ATTEMPTS = 2
ELSEWHERE = 1.0


def run_study(
    plan: Plan | Path | str,
    folder: Path | str,
    workers: int | None = None,
    retry_failed: bool = False,
    execute: Execute | None = None,
    together: int = 1,
    measure: Measure | None = None,
) -> Status:
    """Do the runs of a plan that are not done yet, in `workers` processes (default: one a core), and return the state.

    Idempotent: issued again it continues, with a longer plan it adds runs, issued twice at a time the commands share
    the work. A run that fails is recorded and the others go on; a run whose process died is tried once more. With
    `together` above 1, that many runs train in one pass over a backbone first, in this process. Each final run is then
    measured by the instruments of the plan's `theory`, which `measure` has. Raises `DeltaTuneError` before anything runs
    when a task, backbone or instrument is unknown or a delta has no place in a backbone.
    """
    plan = plan if isinstance(plan, Plan) else Plan.read(plan)
    store = Store(folder, plan.theory)
    check_instruments(plan, measure.names if measure else ())
    inputs = inspect(plan)
    if not store.holds(plan):
        check_places(plan)
    store.open(plan, inputs)
    if retry_failed:
        for found in store.found().values():
            store.forgive(found.id)
    if together > 1:
        from rich.console import Console

        run_groups(plan, store, together, Console(highlight=False, markup=False).print)
    size = workers or cores()
    threads = int(os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // size))).split(",")[0])
    crew = Crew(store, size, threads, execute, measure)
    with Display(plan) as display, crew.at_work():
        Dispatch(plan, store, crew, display).all()
    return status_of(store, plan)


class Dispatch:
    """Hands out runs until none is left, and learns from finished search runs which final runs there are."""

    def __init__(self, plan: Plan, store: Store, crew: Crew, display: Display) -> None:
        self.plan, self.store, self.crew, self.display = plan, store, crew, display
        self.dev = store.dev_scores(plan)
        self.settled: set[Run] = set()
        self.counted: set[Entry] = set()
        self.open: dict[Run, Entry] = {}
        self.elsewhere: dict[Run, float] = {}
        self.deaths: Counter[Run] = Counter()
        self._plan_ahead()
        for entry in list(self.open.values()):
            self._settle_if_over(entry)

    def all(self) -> None:
        """Work until every run is done or failed, here or in another command on the same directory."""
        while self.open:
            self._hand_out()
            for worker, kind, step in self.crew.messages():
                self._hear(worker, kind, step)

    def _plan_ahead(self) -> None:
        entries = self.plan.runs(self.dev)
        for entry in entries:
            # A final run may be one of the candidates again; it is done, but has its own place in the count.
            if entry.run in self.settled and entry not in self.counted:
                self._count(entry)
        # Rebuilt rather than extended, so that the order is the plan's whichever search ended first.
        self.open = dict(reversed([(entry.run, entry) for entry in reversed(entries) if entry.run not in self.settled]))

    def _count(self, entry: Entry) -> None:
        self.counted.add(entry)
        self.display.settle(entry, self.store.find(entry.run.id))

    def _hand_out(self) -> None:
        while (entry := self._next()) and (worker := self.crew.idle()):
            worker.entry = entry
            worker.pipe.send(entry.run)
            self.display.begin(entry)

    def _next(self) -> Entry | None:
        busy = {worker.entry.run for worker in self.crew.workers if worker.entry}
        for run, entry in list(self.open.items()):
            if run in busy or self.elsewhere.get(run, 0.0) > time.monotonic() or self._settle_if_over(entry):
                continue
            if self.store.state(run.id) == "running":
                self.elsewhere[run] = time.monotonic() + ELSEWHERE
                continue
            return entry
        return None

    def _hear(self, worker: Worker, kind: str, value: int | None) -> None:
        entry = worker.entry
        if entry is None:
            return
        if kind == "step":
            self.display.step(entry, value or 0)
            return
        worker.entry = None
        self.display.end(entry)
        if kind == "busy":
            self.elsewhere[entry.run] = time.monotonic() + ELSEWHERE
        if kind == "died":
            self._bury(entry, value)
        self._settle_if_over(entry)

    def _bury(self, entry: Entry, exit_code: int | None) -> None:
        self.deaths[entry.run] += 1
        if self.deaths[entry.run] < ATTEMPTS:
            self.display.say(
                f"the process of {entry.run.id} ended with exit code {exit_code}; trying the run once more"
            )
            return
        with self.store.claim(entry.run.id) as mine:
            if mine and self.store.state(entry.run.id) != "done":
                self.store.begin(entry.run)
                self.store.fail(
                    entry.run.id,
                    "WorkerDied",
                    f"the process that did this run ended {ATTEMPTS} times, last with exit code {exit_code} "
                    "(-9 is often a lack of memory: try fewer --workers); `--retry-failed` tries again.",
                )

    def _settle_if_over(self, entry: Entry) -> bool:
        """Strike a run off when it is done or failed, whoever did it."""
        found = self.store.find(entry.run.id)
        if not found.settled or entry.run in self.settled:
            return found.settled
        self.settled.add(entry.run)
        self.open.pop(entry.run, None)
        self._count(entry)
        if entry.part == "search" and entry.run not in self.dev:
            self.dev[entry.run] = found.dev
            self._plan_ahead()
        return True
