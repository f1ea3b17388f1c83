"""The process that does runs, one after the other, as its parent hands them out over a pipe.

It ends when the parent is gone: an idle one reads the end of the pipe, a busy one fails to report its next step.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deltatune.quiet import quiet
from deltatune.study.store import Store

if TYPE_CHECKING:
    from deltatune.tuning import Run

REPORT_EVERY = 0.2


class Execute(Protocol):
    """What does one run in its folder and can be continued after a crash: `deltatune.tuning.tune`, or a stand-in."""

    def __call__(self, run: Run, folder: Path, on_step: Callable[[dict], None] | None = None) -> dict: ...


class Measure(Protocol):
    """What measures a finished run by the instruments of these `names`: `deltatune.theory.instruments.MEASURE`, or a stand-in."""

    @property
    def names(self) -> Sequence[str]: ...

    def __call__(self, folder: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]: ...


def serve(pipe: Connection, store: Store, threads: int, execute: Execute | None, measure: Measure | None) -> None:
    """Do the runs that arrive on the pipe until None arrives; answer each with ("done" | "failed" | "busy", None)."""
    # Ctrl-C reaches the whole process group; only the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()
    try:
        while (run := pipe.recv()) is not None:
            pipe.send((_do(store, run, execute or _tune(threads), measure, pipe), None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)


def _do(store: Store, run: Run, execute: Execute, measure: Measure | None, pipe: Connection) -> str:
    with store.claim(run.id) as mine:
        if not mine:
            return "busy"
        # Another process may have finished the run between its choice and this lock.
        if (state := store.state(run.id)) in ("done", "failed"):
            return state
        store.begin(run)
        try:
            execute(run, store.run_folder(run.id), on_step=_reporter(pipe))
            if measure and (names := store.unmeasured(run.id)):
                for name, found in measure(store.run_folder(run.id), names):
                    store.keep(run.id, name, found)
        except Exception as error:
            if store.state(run.id) != "failed":
                store.fail(run.id, type(error).__name__, str(error))
        return "failed" if store.find(run.id).failure else "done"


def _tune(threads: int) -> Execute:
    import torch

    from deltatune.tuning import tune

    torch.set_num_threads(threads)
    return tune


def _reporter(pipe: Connection) -> Callable[[dict[str, Any]], None]:
    last = 0.0

    def report(record: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if "step" not in record or now - last < REPORT_EVERY:
            return
        last = now
        try:
            pipe.send(("step", record["step"]))
        except OSError:
            # An exception would be taken for a failure of the run; it is only this process that has to end.
            os._exit(1)

    return report
