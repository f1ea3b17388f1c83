"""Recomputed blocks: they keep their input for the backward pass, which runs them again (Chen et al., 2016, arXiv:1604.06174).

The ports inside a block run again with it, and the gradients are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltatune.core.attach import Attachment, put
from deltatune.core.calls import Ports
from deltatune.core.ports import PORTS, Edit

# where families hand a block what it appends its keys and values to, which a second pass would do twice
CACHES = ("past_key_values", "past_key_value", "layer_past")


class Recompute:
    """around a block: where a gradient is wanted, its forward pass keeps its input and nothing else."""

    method = "recomputed"

    def around(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = partial(type(here.module)._deltatune_base.__call__, here.module)  # type: ignore[attr-defined]
        # What replaces a parameter of the block itself would be gone by the backward pass.
        if here.param or not torch.is_grad_enabled():
            return call(*args, **kwargs)
        names = _names(type(here.module))
        args = tuple(None if name in CACHES else value for name, value in zip(names, args, strict=False))
        call = partial(call, **{name: None if name in CACHES else value for name, value in kwargs.items()})
        # Stopping early would leave a port between its two verbs, with tensors that nobody takes.
        return checkpoint(call, *args, use_reentrant=False, early_stop=False)


@cache
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of what a block is called with, in order."""
    return tuple(signature(kind.forward).parameters)[1:]


def recompute(attachment: Attachment, paths: Iterable[str]) -> None:
    """Have the blocks at `paths` recomputed in the backward pass until the attachment is detached."""
    port = Recompute()
    put(attachment, [Edit(attachment.model.get_submodule(path), "around", port) for path in paths])


@contextmanager
def keeping(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """The scope in which no block is recomputed: what runs there would not find itself in the same state again."""
    held: list[Ports] = [block.__dict__[PORTS] for block in blocks if PORTS in block.__dict__]
    kept = [(ports, ports.around) for ports in held]
    for ports, around in kept:
        ports.around = tuple(port for port in around if not isinstance(port, Recompute))
    try:
        yield
    finally:
        for ports, around in kept:
            ports.around = around
