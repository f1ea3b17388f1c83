"""The worker processes of one command: started when there is work for them, replaced when they die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from deltatune.study.plan import Entry
from deltatune.study.store import Store
from deltatune.study.worker import Execute, Measure, serve

POLL = 0.5
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass
class Worker:
    """A process, the pipe to it, and the entry it works on."""

    process: BaseProcess
    pipe: Connection
    entry: Entry | None = None


@dataclass
class Crew:
    """The worker processes; started when there is work for them, replaced when one dies."""

    store: Store
    size: int
    threads: int
    execute: Execute | None
    measure: Measure | None
    workers: list[Worker] = field(default_factory=list)

    def idle(self) -> Worker | None:
        """A worker that waits for a run, a new one while there are fewer than `size`, else None."""
        for worker in self.workers:
            if worker.entry is None:
                return worker
        if len(self.workers) == self.size:
            return None
        self.workers.append(self._start())
        return self.workers[-1]

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, self.store, self.threads, self.execute, self.measure)
        process = context.Process(target=serve, args=arguments, daemon=True)
        with _environment(self.threads):
            process.start()
        theirs.close()
        return Worker(process, ours)

    def messages(self) -> Iterator[tuple[Worker, str, int | None]]:
        """What the workers said within `POLL` seconds; a dead worker says "died" and leaves the crew."""
        if not self.workers:
            time.sleep(POLL)
        ready = set(wait([worker.pipe for worker in self.workers], timeout=POLL))
        for worker in [worker for worker in self.workers if worker.pipe in ready]:
            try:
                kind, step = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join()
                self.workers.remove(worker)
                kind, step = "died", worker.process.exitcode
            yield worker, kind, step

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Leave no process behind, whatever ends the work; killing one loses only steps since its last checkpoint."""
        try:
            yield
        finally:
            for worker in self.workers:
                worker.process.kill()
            for worker in self.workers:
                worker.process.join()


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Settings that a worker must find before it imports anything: its share of the cores, and deafness to Ctrl-C."""
    before = {name: os.environ.get(name) for name in THREADS}
    handler = signal.getsignal(signal.SIGINT)
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    try:
        _on_interrupt(signal.SIG_IGN)
        yield
    finally:
        _on_interrupt(handler)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _on_interrupt(handler: Callable[[int, FrameType | None], Any] | int | None) -> None:
    # Python lets only the main thread set handlers; elsewhere there is no Ctrl-C to be deaf to.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
