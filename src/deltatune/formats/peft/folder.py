"""A peft folder on disk: found, checked, read without running anything, and written in whole files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from deltatune.errors import DeltaTuneError
from deltatune.files import read_json, write_json
from deltatune.formats.disk import read_safetensors, write_safetensors
from deltatune.formats.peft.config import Config

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def is_peft(path: Path) -> bool:
    """Whether a path is a folder of peft."""
    return (path / CONFIG).is_file()


def read_folder(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """Return the config and the tensors of a peft folder; raises `DeltaTuneError` for pickles and for foreign folders."""
    if not (folder / CONFIG).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        hint = f" It holds adapters of their own: give {folder / inner[0]}." if inner else ""
        raise DeltaTuneError(f"there is no {CONFIG} in {folder}, so it is not a folder of peft.{hint}")
    config = read_json(folder / CONFIG)
    _check_peft(config, folder / CONFIG)
    return Config(config, folder / CONFIG), _tensors(folder)


def _check_peft(config: Any, path: Path) -> None:
    if not isinstance(config, dict):
        raise DeltaTuneError(f"{path} holds no JSON object; peft's config is one.")
    if isinstance(config.get("peft_type"), str):
        return
    if "model_class" in config or str(config.get("version", "")).startswith("adapters."):
        raise DeltaTuneError(
            f"{path} was written by the library `adapters`, which calls its file the same; dt.load reads it, and so does "
            "read_adapterhub."
        )
    raise DeltaTuneError(
        f"{path} has no 'peft_type', so peft did not write it; it has {', '.join(sorted(config)[:5])}."
    )


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise DeltaTuneError(
                f"{folder / PICKLE} is a pickle, which can run any code when it is opened; deltatune reads safetensors only. "
                "Convert it where you trust it: PeftModel.from_pretrained(model, folder).save_pretrained(other folder) of peft."
            )
        raise DeltaTuneError(f"there is no {TENSORS} in {folder}, beside its {CONFIG}.")
    return read_safetensors(path)


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each in one step; the config, by which a folder is known, comes last."""
    write_safetensors(folder / TENSORS, tensors)
    write_json(folder / CONFIG, dict(config))
