"""Files of other libraries, read as weights of deltatune and written from them. Importing this package lets `dt.load` read them."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deltatune.core.store import FORMATS, Format, read
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError, nearest
from deltatune.formats.adapterhub import is_adapterhub, read_adapterhub, write_adapterhub
from deltatune.formats.opendelta import is_opendelta, read_opendelta
from deltatune.formats.peft import is_peft, read_peft, write_peft

__all__ = ["known", "read", "write"]

FORMATS |= {
    "adapterhub": Format(
        "adapter_config.json and adapter.safetensors of the library adapters",
        is_adapterhub,
        read_adapterhub,
        write_adapterhub,
    ),
    "opendelta": Format(
        "config.json with a delta_type and pytorch_model.bin of OpenDelta", is_opendelta, read_opendelta
    ),
    "peft": Format("adapter_config.json and adapter_model.safetensors of peft", is_peft, read_peft, write_peft),
}


def known() -> dict[str, str]:
    """Return one line about every format, by its name."""
    return {name: form.about + ("" if form.write else " (read only)") for name, form in FORMATS.items()}


def write(name: str, model: nn.Module, weights: Weights, folder: Path | str) -> None:
    """Write weights for `model` into `folder` in the format called `name`; raises `DeltaTuneError`, writing nothing, when it cannot."""
    form = FORMATS.get(name)
    if form is None:
        raise DeltaTuneError(f"there is no format {name!r}.{nearest(name, FORMATS)} Known are {', '.join(FORMATS)}.")
    if form.write is None:
        written = ", ".join(other for other, each in FORMATS.items() if each.write)
        raise DeltaTuneError(f"{name} files are read, not written; written are {written}.")
    form.write(model, weights, Path(folder))
