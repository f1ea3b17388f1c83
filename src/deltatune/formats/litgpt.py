"""litgpt's LoRA, read and written: `lit_model.pth.lora`, with rank and alpha in the `hyperparameters.yaml` beside it.

    transformer.h.0.attn.qkv.lora_A [r n, in]   .lora_B [rows of the n chosen among q, k, v; r]   (attn.attn before 0.5)
    transformer.h.0.attn.proj, mlp.fc_1 (gate), mlp.fc_2 (up), mlp.fc (up), mlp.proj (down), lm_head: lora_A [r, in], lora_B [out, r]

Every chosen one of q, k and v has a LoRA of its own, at its role. The adapters `lit_model.pth.adapter` have a gate for each
head, which `LLaMAAdapter` has not, and are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.core.site import Anatomy, anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.files import write_bytes, write_text
from deltatune.formats.disk import Tensors, pickle_bytes, read_tensors_of_pickle, state_dict
from deltatune.formats.guard import reading
from deltatune.formats.loras import by_role, loras_of, one
from deltatune.formats.parts import Part, assemble
from deltatune.formats.paths import place_of
from deltatune.methods.reparameterization.lora import LoRA

TENSORS, SETTINGS = "lit_model.pth.lora", "hyperparameters.yaml"
OTHERS = ("lit_model.pth.adapter", "lit_model.pth.adapter_v2")
ROLES = {
    "attn.proj": "attn.o", "mlp.fc_1": "ffn.gate", "mlp.fc_2": "ffn.up", "mlp.fc": "ffn.up", "mlp.proj": "ffn.down",
    "lm_head": "head",
}  # fmt: skip
PACKED = ("attn.qkv", "attn.attn")  # the name that is written, and the one before 0.5
SIDES = {"attn.q": "query", "attn.k": "key", "attn.v": "value"}
GROUPS = {"projection": ("attn.o",), "mlp": ("ffn.gate", "ffn.up", "ffn.down"), "head": ("head",)}
NAMED = re.compile(r"(?:transformer\.h\.(?P<layer>\d+)\.)?(?P<module>[\w.]+?)\.(?P<leaf>lora_[AB])")
SETTING = re.compile(r"^(lora_\w+):\s*(\S+)\s*$", re.MULTILINE)


def is_litgpt(path: Path) -> bool:
    """Whether a path is a folder of litgpt with what it trained, or such a file."""
    return path.name in (TENSORS, *OTHERS) or any((path / name).is_file() for name in (TENSORS, *OTHERS))


def read_litgpt(model: nn.Module, path: Path | str, check: bool = True) -> Weights:
    """Read a LoRA of litgpt as weights for `model`; raises `DeltaTuneError` for what deltatune cannot compute in the same way."""
    with reading("litgpt", path):
        return _read_weights(model, Path(path))


def _read_weights(model: nn.Module, path: Path) -> Weights:
    folder = path if path.is_dir() else path.parent
    if not (folder / TENSORS).is_file():
        raise DeltaTuneError(
            f"{folder} holds no {TENSORS}; litgpt's adapters have a gate for each head, which no method here has."
        )
    settings, parts = _settings(folder), anatomy(model)
    loaded = read_tensors_of_pickle(folder / TENSORS)
    tensors = state_dict(
        loaded["model"] if isinstance(loaded, dict) and "model" in loaded else loaded, folder / TENSORS
    )
    modules: dict[tuple[str, int | None], Tensors] = {}
    for key, tensor in tensors.items():
        named = NAMED.fullmatch(key)
        if named is None or named["module"] not in {*ROLES, *PACKED}:
            raise DeltaTuneError(f"{folder / TENSORS} holds {key!r}, which is no LoRA of litgpt that is known here.")
        layer = None if named["layer"] is None else int(named["layer"])
        modules.setdefault((named["module"], layer), {})[named["leaf"]] = tensor
    read = [part for (name, layer), held in modules.items() for part in _parts(parts, settings, name, layer, held)]
    if not read:
        raise DeltaTuneError(f"{folder / TENSORS} holds no tensors.")
    return assemble(model, parts, read)


def write_litgpt(model: nn.Module, weights: Weights, folder: Path | str) -> None:
    """Write a LoRA for `model` as a folder of litgpt, tensors and settings, for `litgpt merge_lora` with the backbone's folder.

    Raises `DeltaTuneError`, before anything is written, for other methods and places, and for several ranks or alphas.
    """
    parts, folder = anatomy(model), Path(folder)
    seats = loras_of(model, weights, "litgpt", (LoRA,))
    rank = one("litgpt", "rank", [seat.method.rank for seat in seats])
    alpha = one("litgpt", "alpha", [seat.method.alpha for seat in seats])
    gated = any(place.role == "ffn.gate" for place in parts.places)
    modules = {role: name for name, role in ROLES.items() if name != ("mlp.fc" if gated else "mlp.fc_2")}
    found = by_role(parts, seats, "litgpt", {*modules, *SIDES})
    packed: dict[str, list[Tensors]] = {}
    for role, layer in sorted(found, key=lambda key: (key[1] or 0, [*SIDES, *modules].index(key[0]))):
        name = modules.get(role, PACKED[0])
        at = name if layer is None else f"transformer.h.{layer}.{name}"
        packed.setdefault(at, []).append(found[role, layer].unfolded)
    tensors = {f"{at}.lora_{leaf}": torch.cat([p[leaf] for p in held]) for at, held in packed.items() for leaf in "AB"}
    chosen = {role for role, _ in found}
    groups = {name: (role,) for role, name in SIDES.items()} | GROUPS
    lines = [
        "checkpoint_dir: .",
        f"lora_r: {rank}",
    ]  # merge_lora wants a checkpoint_dir, even if it is told
    lines += [f"lora_alpha: {int(alpha) if alpha == int(alpha) else alpha}", "lora_dropout: 0.0"]
    lines += [f"lora_{name}: {str(not chosen.isdisjoint(roles)).lower()}" for name, roles in groups.items()]
    data = pickle_bytes(tensors, folder, under="model")
    write_text(folder / SETTINGS, "\n".join(lines) + "\n")
    write_bytes(folder / TENSORS, data)


def _settings(folder: Path) -> dict[str, Any]:
    """Return rank, alpha and which of q, k and v are chosen; they stand as plain lines in the file."""
    file = folder / SETTINGS
    try:
        found = dict(SETTING.findall(file.read_text(encoding="utf-8")))
        rank, alpha = int(found["lora_r"]), float(found["lora_alpha"])
    except (OSError, UnicodeDecodeError, KeyError, ValueError):
        raise DeltaTuneError(
            f"{file} has no lines lora_r and lora_alpha with numbers; without them the scale is not known."
        ) from None
    chosen = [role for role, name in SIDES.items() if found.get(f"lora_{name}") == "true"]
    return {"rank": rank, "alpha": alpha, "chosen": chosen}


def _parts(parts: Anatomy, settings: dict[str, Any], name: str, layer: int | None, held: Tensors) -> list[Part]:
    rank, method = settings["rank"], LoRA(settings["rank"], settings["alpha"])
    roles = settings["chosen"] if name in PACKED else [ROLES[name]]
    A, B = held.get("lora_A"), held.get("lora_B")
    if A is None or B is None or not roles or A.shape[0] != rank * len(roles):
        raise DeltaTuneError(
            f"the file holds {', '.join(held)} of {name!r}, which is no LoRA of the rank {rank} for {', '.join(roles) or 'nothing'}."
        )
    heads: Any = parts.stacks[0].heads if parts.stacks else None
    if name in PACKED and heads is None:
        raise DeltaTuneError(f"the heads of {parts.family} are not known, so what {name!r} packs is not either.")
    sizes = (
        [(heads.query if role == "attn.q" else heads.key) * heads.width for role in roles]
        if name in PACKED
        else [len(B)]
    )
    if sum(sizes) != len(B):
        raise DeltaTuneError(
            f"lora_B of {name!r} has {len(B)} rows; {', '.join(roles)} of this model have {sum(sizes)}."
        )
    pairs = zip(roles, A.split(rank), B.split(sizes), strict=True)
    return [Part(place_of(parts, role, layer).path, method, {"A": a, "B": b}, role=role) for role, a, b in pairs]
