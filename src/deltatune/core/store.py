"""Saving and loading weights on a live backbone, and the formats of files that they may be in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from deltatune.core.attach import Attachment, attach
from deltatune.core.weights import Weights


@dataclass(frozen=True)
class Format:
    """A form in which weights stand in files: one line about it, how a folder or file of it is known, and both ways."""

    about: str
    knows: Callable[[Path], bool]
    read: Callable[[nn.Module, Path, bool], Weights]
    write: Callable[[nn.Module, Weights, Path], None] | None = None


def _write_own(model: nn.Module, weights: Weights, folder: Path) -> None:
    weights.write(folder)


# by name, in the order in which a path is tried; `deltatune.formats` adds those of other libraries
FORMATS: dict[str, Format] = {
    "deltatune": Format(
        "delta.safetensors, whose header holds the delta, and a readable delta.json",
        lambda path: (path / "delta.safetensors").exists(),
        lambda model, path, check: Weights.read(path),
        _write_own,
    )
}


def save(what: Attachment | Weights, folder: Path | str) -> None:
    """Write `delta.safetensors` and `delta.json` into `folder`; raises `DeltaTuneError`, keeping what was there, when it cannot."""
    (what.weights if isinstance(what, Attachment) else what).write(folder)


def load(model: nn.Module, path: Path | str, name: str | None = None, check: bool = True) -> Attachment:
    """Read weights from a folder or file, of deltatune or of a library in `formats`, and attach them.

    Raises `DeltaTuneError` when they were made for another backbone.
    """
    return attach(model, read(model, path, check), name, check=check)


def read(model: nn.Module, path: Path | str, check: bool = True) -> Weights:
    """Read weights for `model` from a folder or file of any known format; raises `DeltaTuneError` when it is of none."""
    path = Path(path)
    form = next((form for form in FORMATS.values() if form.knows(path)), FORMATS["deltatune"])
    return form.read(model, path, check)
