"""The module that reads a caller's arguments for a stack, and what extra keys need of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltatune.core.calls import Ports
from deltatune.core.ports import Call
from deltatune.core.site import Stack
from deltatune.errors import DeltaTuneError


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's forward, in order."""
    return tuple(name for name in inspect.signature(type(module).forward).parameters if name != "self")


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def reader(model: nn.Module, stack: Stack) -> nn.Module:
    """Return the module that turns embeddings into the input of a stack: the nearest one around it that takes `inputs_embeds`."""
    path = stack.path
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if "inputs_embeds" in argument_names(module):
            return module
    raise DeltaTuneError(f"nothing around {stack.path!r} takes inputs_embeds, so a soft prompt has no way in.")


@dataclass(frozen=True)
class RowPositions:
    """pre on a rotary stack: count each row's positions from its first token that is not padding.

    Keys of a delta stand at a fixed position; without this, a left-padded row would see them from further away.
    """

    names: tuple[str, ...]
    method: Any

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        given = by_name(self.names, args, kwargs)
        mask, ids = given.get("attention_mask"), given.get("input_ids")
        rows = ids if ids is not None else given["inputs_embeds"]
        if given.get("position_ids") is None and mask is not None and mask.dim() == 2:
            given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -rows.shape[1] :]
        return (), given
