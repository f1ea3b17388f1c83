"""Checkpoints that a kill at any moment leaves whole, without pickle.

A checkpoint is `checkpoint.json` and the two safetensors files it names. The tensors are written first, under names
that carry the step, and the JSON last, in one atomic replacement: until then the previous checkpoint is the one that
counts, and after it the older files are only litter to be swept up.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltatune.errors import DeltaTuneError
from deltatune.files import read_json, write_bytes, write_json

Tensors = dict[str, Tensor]

POINTER = "checkpoint.json"


def write_checkpoint(folder: Path, scalars: dict[str, Any], state: Tensors, best: Tensors) -> None:
    """Write a checkpoint; `scalars` holds `step` and `best_step`, and `best` is written only when it is new."""
    names = {
        "state": f"checkpoint-{scalars['step']:06d}.safetensors",
        "best": f"best-{scalars['best_step']:06d}.safetensors",
    }
    _write_tensors(folder / names["state"], state)
    if _pointer(folder).get("best") != names["best"]:
        _write_tensors(folder / names["best"], best)
    write_json(folder / POINTER, {**names, **scalars})
    sweep(folder, keep=names.values())


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], Tensors, Tensors] | None:
    """Return the scalars, the state and the best tensors of the last whole checkpoint; None when there is none."""
    pointer = _pointer(folder)
    if not pointer:
        return None
    return pointer, _read_tensors(folder / pointer["state"]), _read_tensors(folder / pointer["best"])


def remove_checkpoint(folder: Path) -> None:
    """Remove the checkpoint, the pointer first so that it never names a file that is gone."""
    (folder / POINTER).unlink(missing_ok=True)
    sweep(folder)


def sweep(folder: Path, keep: Iterable[str] = ()) -> None:
    """Remove the tensors of other checkpoints and the temporary files that a killed process left behind."""
    for pattern in ("checkpoint-*.safetensors", "best-*.safetensors", ".*.json.*", ".*.jsonl.*", ".*.safetensors.*"):
        for path in folder.glob(pattern):
            if path.name not in keep:
                path.unlink(missing_ok=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """Split the optimizer's state into tensors and plain values, both keyed `parameter index/name`."""
    tensors: Tensors = {}
    scalars: dict[str, Any] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"optimizer/{index}/{name}"] = value
    return tensors, scalars


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, scalars: dict[str, Any]) -> None:
    """Put back what `pack_optimizer` returned."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **scalars}.items():
        owner, _, rest = key.partition("/")
        if owner == "optimizer":
            index, _, name = rest.partition("/")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def pack_random() -> tuple[Tensors, dict[str, Any]]:
    """Return the states of the random generators of torch, numpy and Python."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "random/torch": torch.get_rng_state(),
        "random/python": torch.tensor(words),
        "random/numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, gauss], "numpy": [int(position), int(has_gauss), float(cached)]}


def unpack_random(tensors: Tensors, scalars: dict[str, Any]) -> None:
    """Put back what `pack_random` returned."""
    version, gauss = scalars["python"]
    random.setstate((version, tuple(tensors["random/python"].tolist()), gauss))
    position, has_gauss, cached = scalars["numpy"]
    keys = tensors["random/numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["random/torch"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])


def cut_log(path: Path, length: int) -> None:
    """Cut the log to the `length` bytes it had at the checkpoint: the steps after it are going to run again."""
    if path.exists():
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, length)


def _pointer(folder: Path) -> dict[str, Any]:
    path = folder / POINTER
    return read_json(path) if path.exists() else {}


def _write_tensors(path: Path, tensors: Tensors) -> None:
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _read_tensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DeltaTuneError(
            f"{path} is missing or not a whole safetensors file ({error}); delete {path.parent / POINTER} to start over."
        ) from error
