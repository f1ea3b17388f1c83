"""A folder of adapters on disk: found, checked, and read without running anything."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.errors import DeltaTuneError
from deltatune.files import read_json, write_json
from deltatune.formats.disk import Tensors, read_safetensors, write_safetensors

CONFIG = "adapter_config.json"
TENSORS = "adapter.safetensors"
PICKLE = "pytorch_adapter.bin"
OTHERS = {
    "adapter_fusion_config.json": "a fusion of several adapters, which is not in one folder",
    "adapter_setup.json": "a composition of adapters, each in a folder of its own: read each by itself",
}
NAMED = re.compile(
    r"(?:(?P<at>.*?)\.)?(?P<kind>adapters|loras|invertible_adapters|prefix_tunings|refts|shared_parameters)\."
)


@dataclass(frozen=True)
class Folder:
    """What a folder says: the adapter's name, the family of the model it was saved from, the configs that are in it, and its tensors."""

    source: Path
    name: str
    family: str
    configs: tuple[dict[str, Any], ...]
    tensors: Tensors

    def one(self, *architectures: str | None, location: str = "") -> dict[str, Any]:
        """Return the config of an architecture at a location; raises `DeltaTuneError` when there is none."""
        for config in self.configs:
            if config.get("architecture") in architectures and (not location or config.get(location, False)):
                return config
        what = " or ".join(name or "a bottleneck" for name in architectures)
        raise DeltaTuneError(
            f"the file beside {self.source} holds tensors of {what}, of which its config says nothing."
        )

    def refuse(self, what: str) -> DeltaTuneError:
        """Return the error that something in the config has no equal in deltatune."""
        return DeltaTuneError(f"{self.source} {what}.")


def is_adapterhub(path: Path) -> bool:
    """Whether a path is a folder of the library `adapters`; peft calls its file the same and has another schema."""
    if any((path / name).is_file() for name in OTHERS):
        return True
    file = path / CONFIG
    if not file.is_file():
        return False
    try:
        config = read_json(file)
    except DeltaTuneError:
        return False
    return isinstance(config, dict) and "peft_type" not in config and isinstance(config.get("config"), dict)


def read_folder(folder: Path) -> Folder:
    """Return the configs and tensors of a folder; raises `DeltaTuneError` for pickles and compositions."""
    for name, what in OTHERS.items():
        if (folder / name).is_file():
            raise DeltaTuneError(f"{folder / name} is {what}.")
    if not is_adapterhub(folder):
        raise DeltaTuneError(
            f"{folder} is not a folder of the library `adapters`: it has no {CONFIG} with a config in it."
        )
    header = read_json(folder / CONFIG)
    config, name = header["config"], header.get("name")
    configs = config.get("configs", []) if config.get("architecture") == "union" else [config]
    if not isinstance(name, str) or not isinstance(configs, list) or not all(isinstance(c, dict) for c in configs):
        raise DeltaTuneError(f"{folder / CONFIG} names no adapter, or holds no configs that are objects.")
    return Folder(
        folder / CONFIG, name, str(header.get("model_type", "")), tuple(map(_current, configs)), _tensors(folder)
    )


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the names that the library has had since its second version."""
    nested = config.get("invertible_adapter")
    return {**config, "inv_adapter": nested.get("block_type")} if isinstance(nested, dict) else config


def _tensors(folder: Path) -> Tensors:
    if (folder / TENSORS).is_file():
        return read_safetensors(folder / TENSORS)
    if (folder / PICKLE).is_file():
        raise DeltaTuneError(
            f"{folder / PICKLE} is a pickle, which can run any code when it is opened; deltatune reads safetensors only. "
            f"Save it again with save_adapter(..., use_safetensors=True); or, where you trust it, save every tensor of it, "
            f"cloned, as {TENSORS}."
        )
    raise DeltaTuneError(f"there is no {TENSORS} in {folder}, beside its {CONFIG}.")


def split(folder: Folder) -> dict[str, dict[str, Tensors]]:
    """Return {kind: {path: {name behind the adapter's: tensor}}}; raises `DeltaTuneError` for tensors of no known kind."""
    found: dict[str, dict[str, Tensors]] = {}
    for key, tensor in folder.tensors.items():
        head, mark, rest = key.partition(f".{folder.name}.")
        known = NAMED.fullmatch(f"{head}.")
        if not mark or known is None:
            raise DeltaTuneError(
                f"the file beside {folder.source} holds {key!r}, which is no tensor of {folder.name!r} that deltatune knows."
            )
        found.setdefault(known["kind"], {}).setdefault(known["at"] or "", {})[rest] = tensor
    return found


def write_folder(folder: Path, header: dict[str, Any], tensors: Tensors) -> None:
    """Write both files, each in one step; the config, by which a folder is known, comes last."""
    write_safetensors(folder / TENSORS, tensors)
    write_json(folder / CONFIG, header)
