"""Measuring: contestants take turns in one process, and what is reported are medians over rounds.

In every round each contestant runs once, in a random order that the seed fixes, so that a slow moment of the machine
meets all of them; ratios and differences are taken inside a round and only then summarised. The first round is thrown
away. On a CPU the unit is CPU time of this process: with one thread, wall time without the waiting for other work on the
machine. On a GPU it is the time between two events, which holds the waiting of the GPU for Python. The garbage collector
runs between the turns, not in them.

Nothing here needs more than torch, so that a library that needs an environment of its own is measured in the same way.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

Stop = Callable[[], float]


def _cpu_time() -> Stop:
    """Start measuring the CPU time of this process."""
    start = time.process_time()
    return lambda: time.process_time() - start


def _gpu_time() -> Stop:
    """Start measuring the time until the GPU has done what is asked of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()

    def stop() -> float:
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return stop


TIMERS: dict[str, Callable[[], Stop]] = {"cpu": _cpu_time, "cuda": _gpu_time}


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Summarise at least two values."""
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(middle, low, high)

    def to_json(self) -> dict[str, float]:
        """Return the three numbers by name."""
        return asdict(self)


@dataclass
class Clock:
    """Seconds per call on a device, by what was measured; one value a round."""

    device: str = "cpu"
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str, calls: int = 1) -> Iterator[None]:
        """Measure the block, which does the same thing `calls` times."""
        stop = TIMERS[self.device]()
        yield
        self.add(what, stop() / calls)

    def add(self, what: str, seconds: float) -> None:
        """Take up a time that was measured elsewhere, in another process for one."""
        self.seconds.setdefault(what, []).append(seconds)

    def median(self, what: str) -> float:
        """Return the median seconds per call."""
        return statistics.median(self.seconds[what])


Turn = Callable[[Clock], None]


def take_turns(
    contestants: Mapping[str, Turn], rounds: int, device: str = "cpu", warmup: int = 1, seed: int = 0
) -> dict[str, Clock]:
    """Run every contestant once a round, in random order, and return their clocks; `warmup` more rounds are not kept."""
    order, shuffle = list(contestants), random.Random(seed)
    clocks = {name: Clock(device) for name in order}
    gc.disable()
    gc.freeze()
    try:
        for turn in range(warmup + rounds):
            if turn == warmup:
                clocks = {name: Clock(device) for name in order}
            shuffle.shuffle(order)
            for name in order:
                contestants[name](clocks[name])
                gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    return clocks


def ratios(above: list[float], below: list[float]) -> Spread:
    """Summarise the quotients inside each round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def differences(above: list[float], below: list[float]) -> Spread:
    """Summarise the differences inside each round."""
    return Spread.of([a - b for a, b in zip(above, below, strict=True)])


def show(spread: Mapping[str, Any], digits: int = 2) -> str:
    """Return `median [low-high]` of a spread as JSON holds it."""
    return f"{spread['median']:.{digits}f} [{spread['low']:.{digits}f}-{spread['high']:.{digits}f}]"


def settle() -> None:
    """Make times repeat: one thread, and freed memory kept, or a pass costs what happens to lie at the heap's end."""
    torch.set_num_threads(1)
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, ALL = -1, -3, 1 << 30
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, ALL)
        libc.mallopt(M_MMAP_THRESHOLD, ALL)
