"""Tracing: which ports of the attached deltas fire when the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltatune.core.calls import Ports
from deltatune.core.ports import PORTS
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class Trace:
    """What one run showed: paths of adapted modules that were called, and of those that were not."""

    fired: tuple[str, ...]
    silent: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.fired)} of {len(self.fired) + len(self.silent)} adapted modules were called"]
        lines += [
            f"never called: {path} (its weight may be read without calling it; merge the delta, or address its parent)"
            for path in self.silent
        ]
        return "\n".join(lines)


def trace(model: nn.Module, example: Mapping[str, Any]) -> Trace:
    """Run `model(**example)` once and report the adapted modules that nothing called: there a delta has no effect."""
    adapted = {path: module for path, module in model.named_modules() if PORTS in module.__dict__}
    if not adapted:
        raise DeltaTuneError("no delta is attached to this model; attach one, then trace.")
    watcher = Watcher()
    with _watched(adapted, watcher), torch.no_grad():
        model(**example)
    fired = tuple(path for path, module in adapted.items() if id(module) in watcher.called)
    return Trace(fired, tuple(path for path in adapted if path not in fired))


class Watcher:
    """pre: remembers which modules were called; a hook would tell torch to leave the fast path that is to be seen."""

    def __init__(self) -> None:
        self.called: set[int] = set()

    def pre(self, here: Ports, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.called.add(id(here.module))
        return args, kwargs


@contextmanager
def _watched(adapted: Mapping[str, nn.Module], watcher: Watcher) -> Iterator[None]:
    kept = [(module.__dict__[PORTS], module.__dict__[PORTS].pre) for module in adapted.values()]
    try:
        for ports, pre in kept:
            ports.pre = (watcher, *pre)
        yield
    finally:
        for ports, pre in kept:
            ports.pre = pre
