"""Memory in use and at its peak, in bytes: of the GPU where the run is on one, else of this process."""

from __future__ import annotations

import contextlib
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


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


def _high_water() -> int:
    # VmHWM follows the reset; ru_maxrss does too, but starts from what the parent process used.
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
