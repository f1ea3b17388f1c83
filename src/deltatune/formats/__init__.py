"""Files of other libraries, read as weights of deltatune and written from them. Importing this package lets `dt.load` read them.

They carry no fingerprint of their backbone, so names and shapes are checked; `check=False` reads in spite of what else a
reader would refuse, where it knows such a thing.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deltatune.core.store import FORMATS, Format, read
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError, nearest
from deltatune.formats.adapterhub import is_adapterhub, read_adapterhub, write_adapterhub
from deltatune.formats.hub import HUB, push
from deltatune.formats.litgpt import is_litgpt, read_litgpt, write_litgpt
from deltatune.formats.loralib import is_loralib, read_loralib, write_loralib
from deltatune.formats.opendelta import is_opendelta, read_opendelta
from deltatune.formats.opendelta_write import write_opendelta
from deltatune.formats.peft import is_peft, read_peft, write_peft
from deltatune.formats.pyreft import is_pyreft, read_pyreft, write_pyreft
from deltatune.formats.torchtune import is_torchtune, read_torchtune, write_torchtune

__all__ = [
    "known",
    "push",
    "read",
    "read_adapterhub",
    "read_litgpt",
    "read_loralib",
    "read_opendelta",
    "read_peft",
    "read_pyreft",
    "read_torchtune",
    "write",
    "write_adapterhub",
    "write_litgpt",
    "write_loralib",
    "write_opendelta",
    "write_peft",
    "write_pyreft",
    "write_torchtune",
]

PUBLIC = tuple(name for name in __all__ if name not in ("known", "read", "write"))  # what `deltatune` has too

FORMATS |= {
    "adapterhub": Format(
        "adapter_config.json and adapter.safetensors of the library adapters",
        is_adapterhub,
        read_adapterhub,
        write_adapterhub,
    ),
    "opendelta": Format(
        "config.json and pytorch_model.bin of OpenDelta", is_opendelta, read_opendelta, write_opendelta
    ),
    "pyreft": Format("config.json and one file an intervention of pyreft", is_pyreft, read_pyreft, write_pyreft),
    "litgpt": Format("lit_model.pth.lora and hyperparameters.yaml of litgpt", is_litgpt, read_litgpt, write_litgpt),
    "torchtune": Format(
        "adapter_model.pt and adapter_config.json of torchtune", is_torchtune, read_torchtune, write_torchtune
    ),
    "peft": Format("adapter_config.json and adapter_model.safetensors of peft", is_peft, read_peft, write_peft),
    "loralib": Format("a state dict of loralib, called a LoRA", is_loralib, read_loralib, write_loralib),
    "hub": HUB,
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
