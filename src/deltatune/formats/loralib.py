"""loralib's state dicts, read and written: `X.lora_A [r, in]` and `X.lora_B [out, r]` for any module X, by `torch.save` or safetensors.

The file does not hold alpha, so whoever reads it has to say it. A packed module (loralib's MergedLinear, of which GPT-2's
attention is one) has factors for some of its parts, one after the other: A [r n, in], B [n out / parts, r].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from deltatune.core.site import Anatomy, Place, anatomy
from deltatune.core.weights import PICKLES, Weights
from deltatune.errors import DeltaTuneError
from deltatune.files import write_bytes
from deltatune.formats.disk import Tensors, pickle_bytes, read_safetensors, read_tensors_of_pickle, state_dict
from deltatune.formats.guard import reading
from deltatune.formats.loras import loras_of, one
from deltatune.formats.parts import Part, assemble
from deltatune.formats.paths import resolve
from deltatune.formats.seats import Seat
from deltatune.methods.reparameterization.lora import LoRA

NAME = "lora.pt"


def is_loralib(path: Path) -> bool:
    """Whether a path is a file that is called a LoRA."""
    return path.is_file() and "lora" in path.name and path.suffix in {*PICKLES, ".safetensors"}


def read_loralib(
    model: nn.Module, path: Path | str, check: bool = True, alpha: float | None = None, enabled: Sequence[str] = ()
) -> Weights:
    """Read a state dict of loralib as weights for `model`.

    `alpha` is the lora_alpha that it was trained with, and `enabled` the parts of packed modules that have factors, such
    as ("q", "v"); all of them when there are as many as parts. Raises `DeltaTuneError` when alpha is not said.
    """
    with reading("loralib", path):
        return _read_weights(model, Path(path), check, alpha, enabled)


def _read_weights(model: nn.Module, path: Path, check: bool, alpha: float | None, enabled: Sequence[str]) -> Weights:
    parts = anatomy(model)
    if alpha is None:
        raise DeltaTuneError(
            f"{path} is a state dict of loralib, which does not say the alpha it was trained with; read it by "
            "formats.read_loralib(model, path, alpha=...)."
        )
    if not path.is_file():
        raise DeltaTuneError(f"there is no file {path}.")
    tensors = (
        read_safetensors(path) if path.suffix == ".safetensors" else state_dict(read_tensors_of_pickle(path), path)
    )
    modules: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            modules.setdefault(module, {})[leaf] = tensor
        elif check:
            raise DeltaTuneError(
                f"{path} holds {key!r}, which is no factor of a LoRA; pass check=False to read the factors without it."
            )
    read = [part for at, held in modules.items() for part in _parts(model, parts, at, held, alpha, enabled)]
    if not read:
        raise DeltaTuneError(f"{path} holds no tensor that is called lora_A or lora_B.")
    return assemble(model, parts, read)


def _parts(
    model: nn.Module, parts: Anatomy, at: str, held: Tensors, alpha: float, enabled: Sequence[str]
) -> list[Part]:
    path = resolve(model, at)
    if held.keys() != {"lora_A", "lora_B"} or any(t.dim() != 2 for t in held.values()):
        raise DeltaTuneError(f"the file holds {', '.join(held)} of {path!r}; a LoRA of a layer has two matrices.")
    A, B = held["lora_A"], held["lora_B"]
    rank = B.shape[1]
    packed = [place.role for place in _packed(parts, path)]
    if not packed or (A.shape[0] == rank != 0 and not enabled):
        return [Part(path, LoRA(rank, float(alpha)), {"A": A, "B": B})]
    count = A.shape[0] // max(rank, 1)
    roles = [role for role in packed if not enabled or role.rpartition(".")[2] in enabled]
    if len(roles) != count or count * rank != A.shape[0] or B.shape[0] % count:
        raise DeltaTuneError(
            f"{path!r} packs {', '.join(packed)}, and the file has factors for {count} of them; say which by "
            'enabled=("q", "v"), in the order of the module.'
        )
    pieces = zip(roles, A.chunk(count), B.chunk(count), strict=True)
    return [Part(path, LoRA(rank, float(alpha)), {"A": a, "B": b}, role=role) for role, a, b in pieces]


def write_loralib(model: nn.Module, weights: Weights, folder: Path | str) -> None:
    """Write a LoRA for `model` as the state dict `lora.pt` of loralib in a folder.

    The file holds no alpha: `read_loralib` needs the alpha of the method, and `enabled` where only some parts of packed
    modules have a LoRA. Raises `DeltaTuneError`, before anything is written, for other methods, for several alphas, and for
    parts that loralib's packed modules have not.
    """
    parts, folder = anatomy(model), Path(folder)
    seats = loras_of(model, weights, "loralib", (LoRA,))
    one("loralib", "alpha", [seat.method.alpha for seat in seats])
    modules: dict[str, list[Seat]] = {}
    for seat in seats:
        modules.setdefault(seat.site.path, []).append(seat)
    enabled = {seat.site.role for seat in seats if seat.site.part is not None}
    tensors: Tensors = {}
    for path, own in modules.items():
        places = _packed(parts, path)
        if enabled and places:
            own = _in_order(path, own, places, enabled)
        for leaf in "AB":
            tensors[f"{path}.lora_{leaf}"] = torch.cat([seat.unfolded[leaf] for seat in own])
    write_bytes(folder / NAME, pickle_bytes(tensors, folder))


def _packed(parts: Anatomy, path: str) -> list[Place]:
    """Return the places that a module packs."""
    return [place for place in parts.places if place.path == path and place.part is not None]


def _in_order(path: str, own: list[Seat], places: list[Place], enabled: set[str]) -> list[Seat]:
    """Return the seats of a packed module in its order; raises `DeltaTuneError` when a file could not be read back as them."""
    seats = {seat.site.role: seat for seat in own if seat.site.part is not None}
    order = [place.role for place in places if place.role in enabled]
    if order != [role for role in order if role in seats] or len(seats) != len(own):
        raise DeltaTuneError(
            f"loralib's file does not say which parts of {path!r} have a LoRA, so all such modules have the same: "
            f"{', '.join(sorted(enabled))}; here are {', '.join(sorted(seats)) or 'none, but one of the whole'}."
        )
    one("loralib", f"rank in {path!r}", [seat.method.rank for seat in own])
    sizes = {(place.part.groups, place.part.stop - place.part.start) for place in places if place.part is not None}
    if len(sizes) != 1 or min(sizes)[0] != 1:
        raise DeltaTuneError(f"loralib's packed modules have equal parts one after the other, which {path!r} has not.")
    return [seats[role] for role in order]
