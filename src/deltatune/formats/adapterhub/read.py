"""From a folder of adapters to weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deltatune.core.site import anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.formats.adapterhub.bottleneck import read_bottlenecks, read_invertible
from deltatune.formats.adapterhub.folder import Folder, read_folder, split
from deltatune.formats.adapterhub.others import read_loras, read_prefixes, read_refts
from deltatune.formats.adapterhub.places import check_family
from deltatune.formats.guard import reading
from deltatune.formats.parts import assemble

KINDS = {
    "prefix_tunings": read_prefixes,
    "loras": read_loras,
    "adapters": read_bottlenecks,
    "invertible_adapters": read_invertible,
    "refts": read_refts,
}
HEAD = "head_config.json"
ELSEWHERE = {
    "prompt_tuning": "its prompt stands in front of the whole row, [CLS] included and behind the norm of the embeddings, and "
    "deltatune's behind the first token and before that norm",
    "mtl_lora": "it has several up projections, mixed by weights of their own",
}


def read_adapterhub(model: nn.Module, folder: Path | str, check: bool = True) -> Weights:
    """Read a folder of `adapters` as weights for `model`; raises `DeltaTuneError` for what deltatune cannot compute in the same way.

    `check=False` accepts a folder that was saved from another family of models, and leaves a prediction head aside.
    """
    with reading("the library adapters", folder):
        return _read_weights(model, Path(folder), check)


def _read_weights(model: nn.Module, folder: Path, check: bool) -> Weights:
    found = read_folder(folder)
    parts = anatomy(model)
    check_family(parts)
    if check and found.family not in ("", parts.family):
        raise found.refuse(
            f"is for a {found.family}, and this is {parts.family}; pass check=False if their modules are the same"
        )
    _check(found)
    if check and (folder / HEAD).is_file():
        raise DeltaTuneError(
            f"{folder} holds a prediction head of the library beside the adapter ({HEAD}), which is no part of this model; "
            "pass check=False to read the adapter without it."
        )
    kinds = split(found)
    kinds.pop("shared_parameters", None)
    read = [
        part for kind, reader in KINDS.items() if kind in kinds for part in reader(model, parts, found, kinds[kind])
    ]
    if not read:
        raise DeltaTuneError(f"the file beside {found.source} holds no tensors of {found.name!r}.")
    return assemble(model, parts, read)


def _check(found: Folder) -> None:
    for config in found.configs:
        architecture = config.get("architecture")
        if architecture in ELSEWHERE:
            raise found.refuse(f"is of the architecture {architecture!r}, which is not read: {ELSEWHERE[architecture]}")
        if architecture == "lora" and (config.get("vera_d") is not None or config.get("vera_b") is not None):
            raise found.refuse(
                "is a VeRA with whole matrices in the place of its vectors, which deltatune has no method for"
            )
