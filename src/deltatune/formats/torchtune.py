"""torchtune's adapters, read and written: `adapter_model.pt`, with rank and alpha in the `adapter_config.json` that it writes beside it.

    layers.0.attn.q_proj.lora_a.weight [r, in]   .lora_b.weight [out, r]   .magnitude [out]   of q_proj, k_proj, v_proj,
    output_proj of attn, w1 (gate), w2 (down), w3 (up) of mlp, and of output

torchtune turns neighbouring features of a head, and transformers features half a head apart; so rows of B (and of the
magnitude) of queries and keys are sorted when read: feature 2 i + j of a head to i + j width / 2; and back when written.
The `adapter_model.safetensors` beside it, for peft, is not so: torchtune 0.6.1 leaves magnitudes as they are, and sorts the
rows of Qwen2 too, whose features stand as transformers has them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltatune.core.site import Anatomy, anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.files import read_json, write_bytes, write_json
from deltatune.formats.disk import Tensors, pickle_bytes, read_tensors_of_pickle, state_dict
from deltatune.formats.guard import reading
from deltatune.formats.loras import by_role, loras_of, one
from deltatune.formats.parts import Part, assemble
from deltatune.formats.paths import place_of
from deltatune.formats.peft import read_peft
from deltatune.methods.reparameterization.dora import DoRA
from deltatune.methods.reparameterization.lora import LoRA

TENSORS, CONFIG = "adapter_model.pt", "adapter_config.json"
EXPORTED = "adapter_model.safetensors"
ROLES = {
    "attn.q_proj": "attn.q", "attn.k_proj": "attn.k", "attn.v_proj": "attn.v", "attn.output_proj": "attn.o",
    "mlp.w1": "ffn.gate", "mlp.w2": "ffn.down", "mlp.w3": "ffn.up", "output": "head",
}  # fmt: skip
TURNED = ("llama", "mistral")  # families whose heads torchtune sorts in another way
SAME = ("qwen2",)
LEAVES = {"A": "lora_a.weight", "B": "lora_b.weight", "m": "magnitude"}
NAMED = re.compile(
    rf"(?:layers\.(?P<layer>\d+)\.)?(?P<module>[\w.]+?)\.(?P<leaf>{'|'.join(map(re.escape, LEAVES.values()))})"
)


def is_torchtune(path: Path) -> bool:
    """Whether a path is a folder of torchtune."""
    return (path / TENSORS).is_file()


def read_torchtune(model: nn.Module, folder: Path | str, check: bool = True) -> Weights:
    """Read a folder of torchtune as weights for `model`, where its heads are not known here what it exported for peft.

    Raises `DeltaTuneError` for a family whose heads are not known when nothing is exported.
    """
    if (Path(folder) / EXPORTED).is_file() and anatomy(model).family not in (*TURNED, *SAME):
        return read_peft(model, folder, check)
    with reading("torchtune", folder):
        return _read_weights(model, Path(folder))


def _read_weights(model: nn.Module, folder: Path) -> Weights:
    parts = _anatomy(model, "read")
    if not (folder / CONFIG).is_file():
        raise DeltaTuneError(
            f"there is no {CONFIG} beside {folder / TENSORS}; without its r and lora_alpha the scale is not known."
        )
    config = read_json(folder / CONFIG)
    rank, alpha = (config.get(name) if isinstance(config, dict) else None for name in ("r", "lora_alpha"))
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise DeltaTuneError(
            f"{folder / CONFIG} says r={rank!r} and lora_alpha={alpha!r}, which are no numbers of a LoRA."
        )
    modules: dict[tuple[str, int | None], Tensors] = {}
    for key, tensor in state_dict(read_tensors_of_pickle(folder / TENSORS), folder / TENSORS).items():
        named = NAMED.fullmatch(key)
        if named is None or named["module"] not in ROLES:
            raise DeltaTuneError(f"{folder / TENSORS} holds {key!r}, which is no LoRA of torchtune that is known here.")
        layer = None if named["layer"] is None else int(named["layer"])
        modules.setdefault((ROLES[named["module"]], layer), {})[named["leaf"]] = tensor
    read = [_part(model, parts, rank, float(alpha), role, layer, held) for (role, layer), held in modules.items()]
    if not read:
        raise DeltaTuneError(f"{folder / TENSORS} holds no tensors.")
    return assemble(model, parts, read)


def write_torchtune(model: nn.Module, weights: Weights, folder: Path | str) -> None:
    """Write a LoRA or DoRA for `model` as a folder of torchtune, tensors and settings.

    Raises `DeltaTuneError`, before anything is written, for other methods, families and places, and for several ranks or alphas.
    """
    parts, folder = _anatomy(model, "written"), Path(folder)
    if (folder / EXPORTED).is_file():
        raise DeltaTuneError(f"{folder} holds an adapter of peft, whose {CONFIG} would be lost; choose another folder.")
    seats = loras_of(model, weights, "torchtune", (LoRA, DoRA))
    one("torchtune", "method", [type(seat.method).__name__ for seat in seats])
    for seat in seats:
        _check_bias(seat.site.path, isinstance(seat.method, DoRA) and seat.site.bias)
    rank = one("torchtune", "rank", [seat.method.rank for seat in seats])
    alpha = one("torchtune", "alpha", [seat.method.alpha for seat in seats])
    modules = {role: module for module, role in ROLES.items()}
    found = by_role(parts, seats, "torchtune", modules)
    tensors: Tensors = {}
    for (role, layer), seat in found.items():
        at = modules[role] if layer is None else f"layers.{layer}.{modules[role]}"
        for leaf, tensor in seat.unfolded.items():
            tensors[f"{at}.{LEAVES[leaf]}"] = tensor if leaf == "A" else _sorted(parts, role, tensor, back=True)
    targets = sorted({seat.site.path.rpartition(".")[2] for seat in seats})
    data = pickle_bytes(tensors, folder)
    write_json(folder / CONFIG, {"r": rank, "lora_alpha": alpha, "target_modules": targets, "peft_type": "LORA"})
    write_bytes(folder / TENSORS, data)


def _anatomy(model: nn.Module, done: str) -> Anatomy:
    """Return the anatomy of a model whose heads are known here."""
    parts = anatomy(model)
    if parts.family not in (*TURNED, *SAME):
        raise DeltaTuneError(f"torchtune's files are {done} for {', '.join((*TURNED, *SAME))}; this is {parts.family}.")
    return parts


def _part(
    model: nn.Module, parts: Anatomy, rank: int, alpha: float, role: str, layer: int | None, held: Tensors
) -> Part:
    path = place_of(parts, role, layer).path
    leaves = {leaf: held[name] for leaf, name in LEAVES.items() if name in held}
    if not leaves.keys() >= {"A", "B"} or leaves["A"].shape[0] != rank:
        raise DeltaTuneError(f"the file holds {', '.join(held)} of {path!r}, which is no LoRA of the rank {rank}.")
    leaves["B"] = _sorted(parts, role, leaves["B"])
    if "m" not in leaves:
        return Part(path, LoRA(rank, alpha), leaves)
    _check_bias(path, getattr(model.get_submodule(path), "bias", None) is not None)
    return Part(path, DoRA(rank, alpha), leaves | {"m": _sorted(parts, role, leaves["m"].flatten())})


def _check_bias(path: str, bias: bool) -> None:
    """Raise `DeltaTuneError` for a DoRA of a layer with a bias."""
    if bias:
        raise DeltaTuneError(
            f"torchtune's DoRA rescales the bias of a layer, which deltatune's leaves alone; {path!r} has one, so that they are "
            "different functions."
        )


def _sorted(parts: Anatomy, role: str, rows: Tensor, back: bool = False) -> Tensor:
    """Return rows of a query's or key's output in the order of transformers, or `back` in that of torchtune."""
    heads: Any = parts.stacks[0].heads
    if role not in ("attn.q", "attn.k") or parts.family in SAME:
        return rows
    if rows.shape[0] != (heads.query if role == "attn.q" else heads.key) * heads.width:
        raise DeltaTuneError(f"the file has {rows.shape[0]} outputs of {role}, and this model has other heads.")
    halves = (2, heads.width // 2) if back else (heads.width // 2, 2)
    return rows.unflatten(0, (-1, *halves)).transpose(1, 2).flatten(0, 2)
