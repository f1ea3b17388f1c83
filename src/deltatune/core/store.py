"""Saving and loading weights on a live backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from deltatune.core.attach import Attachment, attach
from deltatune.core.weights import Weights

# readers of other libraries' folders by the file that marks one; `deltatune.formats` adds them
READERS: dict[str, Callable[[nn.Module, Path, bool], Weights]] = {}


def save(what: Attachment | Weights, folder: Path | str) -> None:
    """Write `delta.safetensors` and `delta.json` into `folder`; raises `DeltaTuneError`, keeping what was there, when it cannot."""
    (what.weights if isinstance(what, Attachment) else what).write(folder)


def load(model: nn.Module, path: Path | str, name: str | None = None, check: bool = True) -> Attachment:
    """Read weights from a folder or file, of deltatune or of a library in `formats`, and attach them.

    Raises `DeltaTuneError` when they were made for another backbone.
    """
    return attach(model, read_weights(model, Path(path), check), name, check=check)


def read_weights(model: nn.Module, path: Path, check: bool) -> Weights:
    """Read weights for `model` from a folder or file, of deltatune or of a library in `formats`."""
    for mark, reader in READERS.items():
        if (path / mark).is_file() and not (path / "delta.safetensors").exists():
            return reader(model, path, check)
    return Weights.read(path)
