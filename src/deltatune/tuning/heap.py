"""The heap of glibc: what a process does with the memory of freed tensors. Other systems' heaps stay as they are."""

from __future__ import annotations

import ctypes
import os
import platform

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # where a user says it
LEAST = 1 << 17  # bytes: what glibc begins with, before freed tensors raise it
MOST = 1 << 25  # bytes: the most that glibc takes
KEPT = 1 << 28


def keep() -> bool:
    """Keep up to 256 MiB of freed memory for the next step, unless a user said otherwise; returns whether this heap does.

    glibc gives the top of its heap back when tensors at it are freed, and every page of it has to be made anew in the next
    step: a tenth of the time of a small backbone's.
    """
    return not any(name in os.environ for name in CHOSEN) and _set({MMAP: MOST, TRIM: KEPT})


def give_back() -> bool:
    """Let the heap give every freed tensor back to the system at once; returns whether this heap can.

    glibc keeps what it has freed, in pieces that often fit nothing, so a process grows to a multiple of what is in use.
    A fixed threshold stops that for the rest of the process, at the price of new pages for each tensor.
    """
    if not _set({MMAP: LEAST, TRIM: LEAST}):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _set(options: dict[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(option, value) for option, value in options.items()])
