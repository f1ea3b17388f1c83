"""What a peft file holds beside its type's own tensors: whole parameters (`modules_to_save`, tables) and biases.

modules_to_save    X.weight, X.bias                     -> `Full` at X
bias               X.base_layer.bias, X.bias            -> `BitFit` at X, of the difference to the model's own bias
tables             X.base_layer.weight, X.weight        -> nothing where it is the model's own, else `Full` at X
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import DeltaTuneError, nearest
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.names import targets
from deltatune.formats.seats import Seat
from deltatune.methods.specification.bitfit import BitFit
from deltatune.methods.specification.full import Full

BASE = ".base_layer."


def read_values(model: nn.Module, config: Config, held: Mapping[str, Tensor]) -> tuple[list[Part], list[Part]]:
    """Return what the keys, which name the model's own parameters, say: whole values first, then biases."""
    own = dict(model.named_parameters(remove_duplicate=False))
    modules: dict[str, Tensors] = {}
    for name, tensor in _named(model, config, held, own).items():
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, {})[leaf] = tensor
    values, biases = [], []
    for path, tensors in modules.items():
        saved = any(path.endswith(name) or f".{name}." in f".{path}." for name in config.get("modules_to_save", []))
        mine = {leaf: own[f"{path}.{leaf}"].detach().to("cpu", torch.float32) for leaf in _parameters(model, path)}
        if not saved and set(tensors) == {"bias"} and len(mine) > 1:
            biases.append(Part(path, BitFit(), {"b": tensors["bias"] - mine["bias"]}))
        elif saved or any(not torch.equal(tensor, mine[leaf]) for leaf, tensor in tensors.items()):
            if saved:
                _check_untied(own, path, mine, held)
            if _inner(model, path):
                raise DeltaTuneError(
                    f"the file gives {path!r} a new {' and '.join(tensors)}, but that module holds others, and deltatune "
                    "replaces the parameters of whole modules; merge it in peft."
                )
            values.append(Part(path, Full(), {f"{leaf}.value": tensors.get(leaf, t) for leaf, t in mine.items()}))
    return values, biases


def _named(model: nn.Module, config: Config, held: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors by the names of the model's parameters, those that it ties and that are equal once."""
    found: Tensors = {}
    names: dict[int, str] = {}
    for key, tensor in held.items():
        name = key.replace(BASE, ".")
        if name not in own:
            raise _unknown(config, key, own)
        if own[name].shape != tensor.shape:
            words = "; resize the model's embeddings first" if tensor.dim() == 2 else ""
            raise DeltaTuneError(
                f"{key!r} of the file has the shape {tuple(tensor.shape)}, this model's {tuple(own[name].shape)}{words}."
            )
        first = names.setdefault(id(own[name]), name)
        if first != name and torch.equal(found.get(first, tensor), tensor):
            if not _inner(model, first.rpartition(".")[0]):
                continue
            found.pop(first, None)
            names[id(own[name])] = name
        found[name] = tensor
    return found


def _inner(model: nn.Module, path: str) -> bool:
    """Whether a module holds others, which a where of it would find as well."""
    return any(True for _ in model.get_submodule(path).children())


def _parameters(model: nn.Module, path: str) -> list[str]:
    return [name for name, _ in model.get_submodule(path).named_parameters(recurse=False)]


def _unknown(config: Config, key: str, own: Mapping[str, Tensor]) -> DeltaTuneError:
    left = " The adapter's name is left in it: save with peft's save_pretrained." if ".default" in key else ""
    return DeltaTuneError(
        f"the file holds {key!r}, which is neither a tensor of {config.type} at a module of this model nor one of its "
        f"parameters.{left or nearest(key, own)}"
    )


def _check_untied(own: Mapping[str, Tensor], path: str, mine: Tensors, held: Mapping[str, Tensor]) -> None:
    """Raise `DeltaTuneError` when peft would give one of several tied parameters a value of its own."""
    for leaf in mine:
        name = f"{path}.{leaf}"
        ties = [other for other, tensor in own.items() if tensor is own[name] and other != name]
        if any(other not in held or not torch.equal(held[other], held[name]) for other in ties if name in held):
            raise DeltaTuneError(
                f"the file gives {name!r} a value of its own, but this model ties it to {', '.join(ties)}; untie them first."
            )


def bias_trap(config: Config, modules: list[nn.Module], found: bool) -> None:
    """Raise `DeltaTuneError` when biases were trained and the file has none of them."""
    said = str(config.get("bias", "none"))
    if said.endswith("_only") and not found and any("bias" in dict(m.named_parameters(recurse=False)) for m in modules):
        raise DeltaTuneError(
            f"{config.source} says bias={said!r}, but the file holds no bias: peft 0.7 to 0.20 did not save them. Train them "
            "again, or pass check=False to read the rest."
        )


def write_values(model: nn.Module, seats: list[Seat]) -> tuple[Tensors, list[str]]:
    """Return the tensors of Full's seats and the names of their modules for `modules_to_save`."""
    modules: dict[str, Tensors] = {}
    for seat in seats:
        if seat.site.ties:
            raise DeltaTuneError(
                f"{seat.site.address!r} is tied to {'.'.join(seat.site.ties[0])}; peft would untie them, so {seat.method} there "
                "is not written for it."
            )
        modules.setdefault(seat.site.path, {})[seat.site.tensor or ""] = seat.leaves["value"]
    for path, tensors in modules.items():
        lacking = set(_parameters(model, path)) - set(tensors)
        if lacking:
            raise DeltaTuneError(f"peft saves whole modules; of {path!r} the delta lacks {', '.join(sorted(lacking))}.")
    names = targets(model, set(modules), loose=True) if modules else []
    if isinstance(names, str):
        raise DeltaTuneError(
            f"no names tell the modules {', '.join(modules)} from others as peft's modules_to_save do."
        )
    return {f"{path}.{leaf}": t for path, tensors in modules.items() for leaf, t in tensors.items()}, names


def write_biases(model: nn.Module, seats: list[Seat], lora: Mapping[str, Seat]) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors of BitFit's seats and what the config says of them; `lora` are LoRA's seats by module."""
    own = [seat for seat in seats if seat.site.bias]
    added = {seat.site.path: seat for seat in seats if not seat.site.bias}
    strangers = sorted(added.keys() - lora.keys())
    if strangers:
        raise DeltaTuneError(
            f"{strangers[0]!r} has no bias, and peft adds one only where a LoRA is; {added[strangers[0]].method} there is "
            "not written for it."
        )
    tensors: Tensors = {}
    for seat in own:
        mine = model.get_parameter(f"{seat.site.path}.bias").detach().to("cpu", torch.float32)
        tensors[f"{seat.site.path}{BASE if seat.site.path in lora else '.'}bias"] = mine + seat.leaves["b"]
    for path, low in lora.items() if added else ():
        b = added[path].leaves["b"] if path in added else low.leaves["B"].new_zeros(len(low.leaves["B"]))
        tensors[f"{path}.lora_B.bias"] = b / (low.method.alpha / low.method.rank)
    fields: dict[str, Any] = {"bias": "all"} if own else {}
    return tensors, fields | ({"lora_bias": True} if added else {})
