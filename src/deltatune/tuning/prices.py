"""What a step's operations take on this machine: each kind of call runs here for real, on tensors of its own.

    seconds = sum over calls of  price(call) + overhead

A price is the time of the call alone, on made-up numbers; the overhead is what Python and autograd add to a call, found with a
small step. Calls on more memory than `LARGEST` are priced by a roofline.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from deltatune.core.products import few_rows
from deltatune.tuning.deterministic import deterministic
from deltatune.tuning.rates import Rates, rates, wait
from deltatune.tuning.tally import Like, Work, fakes, tally

LARGEST = 1 << 29  # bytes that the arguments of a call may have
LONG = 0.05  # seconds of a first call, beyond which it is not repeated
TIMES, LAYERS, WIDTH = 3, 16, 8


@dataclass
class Prices:
    """The seconds of calls on a device, each found once, and what is added to every call; most products are of `dtype`."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    overhead: float = 0.0
    found: dict[Work, float] = field(default_factory=dict)

    @cached_property
    def rates(self) -> Rates:
        """What bounds a call that is not tried."""
        return rates(self.device, self.dtype)

    def seconds(self, work: Iterable[Work]) -> float:
        """Return the estimated time of some operations, one after another."""
        return sum(count * (self.overhead + self.price(one)) for one, count in Counter(work).items())

    def price(self, work: Work) -> float:
        """Return the seconds of one call."""
        if work not in self.found:
            self.found[work] = self._tried(work)
        return self.found[work]

    def _tried(self, work: Work) -> float:
        tensors = [leaf for leaf in work.given if isinstance(leaf, Like)]
        # Bytes are what another call has written for this one, which trusts them.
        if sum(one.bytes for one in tensors) > LARGEST or any(one.dtype == torch.uint8 for one in tensors):
            return self.rates.bound(work)
        args, kwargs = tree_unflatten([made(g) if isinstance(g, Like) else g for g in work.given], work.form)
        here = [self.device] if self.device.type == "cuda" else []
        library = nullcontext() if work.asked else few_rows()
        with torch.no_grad(), torch.random.fork_rng(here), deterministic(self.device), library:
            try:
                return timed(lambda: work.call(*args, **kwargs), self.device)
            except (RuntimeError, IndexError):  # made-up numbers may be none that can be decomposed
                return self.rates.bound(work)


def prices(device: torch.device, dtype: torch.dtype = torch.float32) -> Prices:
    """Return prices for a device; each is found when it is asked for."""
    found = Prices(device, dtype)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(LAYERS))).to(
        device
    )
    x = torch.ones(WIDTH, WIDTH, device=device)

    def step(model: nn.Module, x: Tensor) -> None:
        model(x).square().mean().backward()

    with tally() as counted:
        copy, like = fakes(model, device), torch.empty_like(x, device=device)
        counted.work.clear()
        step(copy, like)
    whole = timed(lambda: step(model, x), device)
    found.overhead = max(whole - found.seconds(counted.work), 0.0) / len(counted.work)
    return found


def made(like: Like) -> Tensor:
    """Return a tensor of these looks: its numbers are a half, its places 0, and its masks hide nothing."""
    value = 0.5 if like.dtype.is_floating_point else like.dtype is torch.bool
    return torch.full((like.numbers,), value, dtype=like.dtype, device=like.device).as_strided(like.shape, like.stride)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call, the median of a few behind a first one."""
    first = _once(call, device)
    return first if first > LONG else median(_once(call, device) for _ in range(TIMES))


def _once(call: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start
