"""Tracing: which ports of the attached deltas fire when the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltatune.core.calls import Ports
from deltatune.core.fused import noting
from deltatune.core.ports import PORTS
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class Trace:
    """What one run showed: paths of adapted modules that were called, of those that were not, and of those that train fused."""

    fired: tuple[str, ...]
    silent: tuple[str, ...]
    fused: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{len(self.fired)} of {len(self.fired) + len(self.silent)} adapted modules were called; "
            f"{len(self.fused)} of them train on a fused path"
        ]
        lines += [
            f"never called: {path} (its weight may be read without calling it; merge the delta, or address its parent)"
            for path in self.silent
        ]
        return "\n".join(lines)


def trace(model: nn.Module, example: Mapping[str, Any]) -> Trace:
    """Run `model(**example)` and report the adapted modules that nothing called: there a delta has no effect.

    A second run, which records gradients and keeps nothing for them, tells which modules train on a fused path.
    """
    adapted = {path: module for path, module in model.named_modules() if PORTS in module.__dict__}
    if not adapted:
        raise DeltaTuneError("no delta is attached to this model; attach one, then trace.")
    called, learning = Watcher(), Watcher()
    with _watched(adapted, called), torch.no_grad():
        model(**example)
    with _watched(adapted, learning), noting(learning.note), torch.enable_grad(), _forgetting():
        model(**example)
    fired = tuple(path for path, module in adapted.items() if id(module) in called.called)
    fused = tuple(path for path, module in adapted.items() if id(module) in learning.fused)
    return Trace(fired, tuple(path for path in adapted if path not in fired), fused)


class Watcher:
    """pre and post: remember which modules were called, and which of them chose the fused path.

    A hook would tell torch to leave the fast path that is to be seen.
    """

    def __init__(self) -> None:
        self.called: set[int] = set()
        self.fused: set[int] = set()
        self.inside: list[int] = []

    def pre(self, here: Ports, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.called.add(id(here.module))
        self.inside.append(id(here.module))
        return args, kwargs

    def post(self, here: Ports, args: Any, kwargs: Any, y: Any) -> Any:
        self.inside.pop()
        return y

    def note(self, fused: bool) -> None:
        """Hear that the module that is running took the fused path, or the plain one."""
        if fused:
            self.fused.add(self.inside[-1])


def _forgetting() -> AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


@contextmanager
def _watched(adapted: Mapping[str, nn.Module], watcher: Watcher) -> Iterator[None]:
    kept = [
        (module.__dict__[PORTS], module.__dict__[PORTS].pre, module.__dict__[PORTS].post) for module in adapted.values()
    ]
    try:
        for ports, pre, post in kept:
            ports.pre, ports.post = (watcher, *pre), (*post, watcher)
        yield
    finally:
        for ports, pre, post in kept:
            ports.pre, ports.post = pre, post
