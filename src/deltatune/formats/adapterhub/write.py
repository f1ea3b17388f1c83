"""From weights to a folder of adapters; what the library cannot express is refused by name before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from deltatune.core.site import anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.formats.adapterhub.folder import write_folder
from deltatune.formats.adapterhub.places import check_family
from deltatune.formats.adapterhub.target import Target, Written
from deltatune.formats.adapterhub.write_bottleneck import INVERTIBLE, METHODS, write_bottlenecks, write_invertible
from deltatune.formats.adapterhub.write_others import LOW_RANK, is_prefix, write_loras, write_prefixes, write_refts
from deltatune.formats.seats import Seat, seats_of
from deltatune.methods.addition.direft import DiReFT
from deltatune.methods.addition.loreft import LoReFT
from deltatune.methods.addition.noreft import NoReFT
from deltatune.methods.combine.at_positions import AtPositions

VERSION = "adapters.1.3.0"  # whose schema this is
WRITERS: tuple[tuple[Callable[[Any], bool], Callable[[Target, Sequence[Seat]], list[Written]]], ...] = (
    (is_prefix, write_prefixes),
    (lambda method: isinstance(method, LOW_RANK), write_loras),
    (lambda method: isinstance(method, METHODS), write_bottlenecks),
    (lambda method: isinstance(method, INVERTIBLE), write_invertible),
    (lambda method: isinstance(method, AtPositions | LoReFT | NoReFT | DiReFT), write_refts),
)


def write_adapterhub(model: nn.Module, weights: Weights, folder: Path | str, name: str = "deltatune") -> None:
    """Write weights for `model` as a folder that the library `adapters` loads; the adapter is called `name` in it.

    Raises `DeltaTuneError`, before anything is written, for what the library cannot compute in the same way.
    """
    target = Target(model, anatomy(model), name)
    check_family(target.parts)
    if not name.isidentifier():
        raise DeltaTuneError(f"{name!r} cannot stand in keys; call the adapter by a plain name such as 'sst2'.")
    seats: dict[int, list[Seat]] = {}
    for seat in seats_of(model, weights):
        seats.setdefault(_writer(seat.method), []).append(seat)
    written = [found for index, own in sorted(seats.items()) for found in WRITERS[index][1](target, own)]
    configs = [config for config, _ in written]
    tensors = {key: tensor for _, own in written for key, tensor in own.items()}
    config = configs[0] if len(configs) == 1 else {"architecture": "union", "configs": configs}
    settings: Any = model.config
    header = {"config": config, "hidden_size": target.hidden, "model_class": type(model).__name__, "model_name": ""}
    write_folder(Path(folder), {**header, "model_type": settings.model_type, "name": name, "version": VERSION}, tensors)


def _writer(method: Any) -> int:
    for index, (fits, _) in enumerate(WRITERS):
        if fits(method):
            return index
    raise DeltaTuneError(
        f"the library `adapters` has nothing like {method}; written are bottlenecks, Compacter, InvertibleAdapter, LoRA, DoRA, IA3, "
        "PrefixTuning, and LoReFT and NoReFT at positions."
    )
