"""What the writers of AdapterHub write for, and what they make of some of a delta's seats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltatune.core.site import Anatomy
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.seats import Seat

Written = tuple[dict[str, Any], Tensors]  # a config, and tensors by their keys


@dataclass(frozen=True)
class Target:
    """What is written for: a model, its anatomy, and the adapter's name in the keys."""

    model: nn.Module
    parts: Anatomy
    name: str

    @property
    def root(self) -> str:
        """The path of the model without its head, as a prefix of keys."""
        prefix = getattr(self.model, "base_model_prefix", "")
        return f"{prefix}." if prefix in dict(self.model.named_children()) else ""

    @property
    def hidden(self) -> int:
        """The width of the hidden states, as the config says it."""
        config: Any = self.model.config
        return config.hidden_size


def one(seats: Sequence[Seat], what: str) -> Any:
    """Return the method of all seats; raises `DeltaTuneError` when there are several."""
    methods = list(dict.fromkeys(seat.method for seat in seats))
    if len(methods) > 1:
        raise DeltaTuneError(
            f"a config of the library has one {what}; this delta has {' and '.join(map(str, methods))}."
        )
    return methods[0]
