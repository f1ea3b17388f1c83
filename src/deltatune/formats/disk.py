"""Files of tensors, read without running anything and written whole; every value finite, every float in single precision."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from deltatune.errors import DeltaTuneError
from deltatune.files import write_bytes

Tensors = dict[str, Tensor]


def read_safetensors(path: Path) -> Tensors:
    """Return the tensors of a safetensors file; raises `DeltaTuneError` when it is not a whole one."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DeltaTuneError(f"{path} is not a whole safetensors file ({error}); copy or save it again.") from None
    return _checked(tensors, path)


def read_tensors_of_pickle(path: Path) -> Any:
    """Return what a file of `torch.save` holds where that is tensors in plain containers.

    torch's own restricted reader builds nothing else and calls nothing that the file names; anything else in the file is a
    `DeltaTuneError`.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken or hostile pickle raises is of any kind
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise DeltaTuneError(
            f"{path} is not a file of plain tensors, whole and without code ({why[0][:120]})."
        ) from None


def state_dict(value: Any, path: Path) -> Tensors:
    """Return a value as tensors by name; raises `DeltaTuneError` when it is something else."""
    if not isinstance(value, Mapping) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in value.items()
    ):
        raise DeltaTuneError(f"{path} holds no tensors by name, as a state dict does.")
    return _checked({name: tensor.detach() for name, tensor in value.items()}, path)


def _checked(tensors: Mapping[str, Tensor], path: Path) -> Tensors:
    for name, tensor in tensors.items():
        if tensor.is_sparse or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise DeltaTuneError(f"the tensor {name!r} of {path} is not a plain one; save it dense and real.")
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise DeltaTuneError(f"the tensor {name!r} of {path} holds NaN or infinity.")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def safetensors_bytes(tensors: Mapping[str, Tensor], folder: Path) -> bytes:
    """Return tensors as a safetensors file; raises `DeltaTuneError` for NaN and infinity."""
    return to_bytes(_ready(tensors, folder), {"format": "pt"})


def pickle_bytes(tensors: Mapping[str, Tensor], folder: Path, under: str = "") -> bytes:
    """Return tensors by name as a file of `torch.save`, `under` a name or by themselves; raises `DeltaTuneError` for NaN and infinity."""
    ready, file = _ready(tensors, folder), BytesIO()
    torch.save({under: ready} if under else ready, file)
    return file.getvalue()


def _ready(tensors: Mapping[str, Tensor], folder: Path) -> Tensors:
    ready = {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in tensors.items()}
    for name, tensor in ready.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DeltaTuneError(f"the tensor {name!r} holds NaN or infinity; nothing was written to {folder}.")
    return ready


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in one step."""
    write_bytes(path, safetensors_bytes(tensors, path.parent))
