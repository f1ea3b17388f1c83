"""Saving and loading weights on a live backbone."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deltatune.core.attach import Attachment, attach
from deltatune.core.weights import Weights


def save(what: Attachment | Weights, folder: Path | str) -> None:
    """Write `delta.safetensors` and `delta.json` into `folder`; raises `DeltaTuneError`, keeping what was there, when it cannot."""
    (what.weights if isinstance(what, Attachment) else what).write(folder)


def load(model: nn.Module, path: Path | str, name: str | None = None, check: bool = True) -> Attachment:
    """Read weights from a folder or file and attach them; raises `DeltaTuneError` when they were made for another backbone."""
    return attach(model, Weights.read(path), name, check=check)
