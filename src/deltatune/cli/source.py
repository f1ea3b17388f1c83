"""Where the commands get a delta from: a file or folder of deltatune, or one of another library, with its backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltatune.errors import DeltaTuneError

if TYPE_CHECKING:
    from torch import nn

    from deltatune.core.weights import Weights

On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="BACKBONE",
        help="The backbone: a built-in name, a folder, or a hub name.",
    ),
]


def read(path: Path, model: nn.Module | None) -> Weights:
    """Read weights of any format; raises `DeltaTuneError` where another library's need a backbone and there is none."""
    from deltatune import formats
    from deltatune.core.store import FORMATS
    from deltatune.core.weights import Weights
    from deltatune.formats.hub import local

    path = local(path)
    if model is not None:
        return formats.read(model, path)
    other = next((name for name, form in FORMATS.items() if form.knows(path)), "deltatune")
    if other != "deltatune":
        raise DeltaTuneError(f"{path} is a folder of {other}; name the backbone that it is for: --on BACKBONE.")
    return Weights.read(path)


def backbone(name: str | None) -> nn.Module | None:
    """Load the model of a backbone, if one is named."""
    from deltatune.backbones import load

    return None if name is None else load(name).model


def needed(name: str | None, why: str) -> nn.Module:
    """Load the model of a backbone; raises `DeltaTuneError` with the reason when none is named."""
    model = backbone(name)
    if model is None:
        raise DeltaTuneError(f"{why}: name the backbone with --on BACKBONE.")
    return model


def check(weights: Weights, model: nn.Module) -> None:
    """Raise `DeltaTuneError` when weights were made for another backbone or do not fit it."""
    from deltatune.core.delta import place
    from deltatune.core.fit import check_backbone, check_tensors
    from deltatune.core.weights import fingerprint

    check_backbone(weights.backbone, fingerprint(model), check=True)
    check_tensors(weights, place(model, weights.delta))


def fitted(path: Path, model: nn.Module) -> Weights:
    """Read weights of any format for a backbone; raises `DeltaTuneError` when they were made for another one."""
    weights = read(path, model)
    check(weights, model)
    return weights
