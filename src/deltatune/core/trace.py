"""Tracing: which ports of the attached deltas fire when the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
    called: set[int] = set()
    with _watched(adapted, called), torch.no_grad():
        model(**example)
    fired = tuple(path for path, module in adapted.items() if id(module) in called)
    return Trace(fired, tuple(path for path in adapted if path not in fired))


@contextmanager
def _watched(adapted: Mapping[str, nn.Module], called: set[int]) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(lambda module, _: called.add(id(module))) for m in adapted.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
