"""How fast this machine is, measured in under a second, and what that says about a step: a roofline.

seconds = sum over operations of  overhead + max(flops / matmul rate, bytes / bandwidth)
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
    """Floating-point operations a second in a matrix product, bytes a second in passes over memory, seconds an operation."""

    flops: float
    bandwidth: float
    overhead: float

    def seconds(self, work: Iterable[Work]) -> float:
        """Return the estimated time of some operations, one after another."""
        return sum(self.overhead + max(w.flops / self.flops, w.bytes / self.bandwidth) for w in work)


def measure(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """Measure a matrix product of this type, the bandwidth of additions, and the time of one small operation."""
    a, b = torch.ones(ROWS, WIDTH, device=device, dtype=dtype), torch.ones(WIDTH, WIDTH, device=device, dtype=dtype)
    x, small = torch.ones(1 << 22, device=device), torch.ones(8, device=device)
    y = torch.ones_like(x)
    with products(device):
        product = _best(lambda: torch.mm(a, b), device)
    passes = _best(lambda: torch.add(x, x, out=y), device)
    overhead = _best(lambda: torch.add(small, small), device, calls=200)
    return Rates(2 * ROWS * WIDTH * WIDTH / product, 2 * x.nbytes / passes, overhead)


def _best(call: Callable[[], object], device: torch.device, calls: int = 1, spent: float = 0.15) -> float:
    """Return the seconds of a call, the quickest of as many as `spent` seconds allow."""
    call()
    found, end = float("inf"), time.perf_counter() + spent
    while time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        found = min(found, (time.perf_counter() - start) / calls)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
