"""Memory in use and at its peak, in bytes: of the GPU where the run is on one, else of this process."""

from __future__ import annotations

import contextlib
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from deltatune.errors import DeltaTuneError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def in_use(device: torch.device) -> int:
    """Return the bytes allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    return _high_water()


class Peak:
    """The highest memory use since it was made, `bytes`, leaving out what is done inside `paused`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._reset()

    def note(self) -> int:
        """Take the present high-water mark into account and return the peak so far."""
        high = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _high_water()
        self.bytes = max(self.bytes, high)
        return self.bytes

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what the body uses: writing a checkpoint is not what a method costs."""
        self.note()
        yield
        self._reset()

    def _reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        # Linux only; elsewhere the mark counts from the start of the process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def size(text: str) -> int:
    """Read a number of bytes such as `2GB`, `800MiB` or `1.5e9`; raises `DeltaTuneError` for anything else."""
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if found is None or found[2] not in UNITS or not re.fullmatch(r"\d*\.?\d+(?:e\d+)?|\d+\.", found[1]):
        raise DeltaTuneError(f"{text!r} is no amount of memory; write for example 2GB, 800MiB or a number of bytes.")
    return int(float(found[1]) * UNITS[found[2]])


def _high_water() -> int:
    # VmHWM follows the reset; ru_maxrss does too, but starts from what the parent process used.
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
