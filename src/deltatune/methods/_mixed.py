"""Checks that several combinators share."""

from __future__ import annotations

from deltatune.errors import DeltaTuneError
from deltatune.methods._combined import Combined

VALUES = ("linear", "stream", "branch", "tensor")


def no_heads(method: Combined, reason: str) -> None:
    """Raise `DeltaTuneError` when the children make something else than a new value of what is there."""
    if method.acts not in VALUES:
        raise DeltaTuneError(
            f"{type(method).__name__} cannot combine {', '.join(map(str, method.children))}: {reason}."
        )


def some(method: Combined) -> None:
    """Raise `DeltaTuneError` when there is nothing to combine."""
    if not method.children:
        name = type(method).__name__
        raise DeltaTuneError(f"{name}(()) combines nothing; write for example {name}((LoRA(), Adapter())).")
