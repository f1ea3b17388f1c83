"""How fast this machine is at best, measured in under a second: a roofline.

seconds >= sum over operations of  max(flops / matmul rate, bytes / bandwidth)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from deltatune.core.products import products
from deltatune.tuning.tally import Work

ROWS, WIDTH = 512, 1024  # of the product that is measured: tokens of a small batch, and a usual width


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second in a matrix product, and bytes a second in passes over memory."""

    flops: float
    bandwidth: float

    def seconds(self, work: Iterable[Work]) -> float:
        """Return the least time of some operations, one after another."""
        return sum(map(self.bound, work))

    def bound(self, work: Work) -> float:
        """Return the least time of one operation."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


def rates(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """Measure a matrix product of this type, and the bandwidth of additions."""
    a, b = torch.ones(ROWS, WIDTH, device=device, dtype=dtype), torch.ones(WIDTH, WIDTH, device=device, dtype=dtype)
    x = torch.ones(1 << 22, device=device)
    y = torch.ones_like(x)
    with products(device):
        product = _best(lambda: torch.mm(a, b), device)
    passes = _best(lambda: torch.add(x, x, out=y), device)
    return Rates(2 * ROWS * WIDTH * WIDTH / product, 2 * x.nbytes / passes)


def _best(call: Callable[[], object], device: torch.device, spent: float = 0.15) -> float:
    """Return the seconds of a call, the quickest of as many as `spent` seconds allow."""
    call()
    found, end = float("inf"), time.perf_counter() + spent
    while time.perf_counter() < end:
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        found = min(found, time.perf_counter() - start)
    return found


def wait(device: torch.device) -> None:
    """Wait for all that the device has been asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
