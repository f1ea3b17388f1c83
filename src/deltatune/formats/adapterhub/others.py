"""LoRA, DoRA and (IA)^3 at linears, prefixes in attention, and ReFT behind blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.method import Method
from deltatune.core.site import Anatomy, Place
from deltatune.errors import DeltaTuneError
from deltatune.formats.adapterhub.folder import Folder
from deltatune.formats.adapterhub.places import BERTS
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.paths import resolve
from deltatune.methods.addition.direft import DiReFT
from deltatune.methods.addition.ia3 import IA3
from deltatune.methods.addition.loreft import LoReFT
from deltatune.methods.addition.noreft import NoReFT
from deltatune.methods.addition.prefix_tuning import PrefixTuning
from deltatune.methods.combine.at_positions import AtPositions
from deltatune.methods.combine.reparam import MLP, Reparam
from deltatune.methods.reparameterization.dora import DoRA
from deltatune.methods.reparameterization.lora import LoRA

LOCATION = "self_prefix"  # the library's name for the attention of a model with one stack


def check_prefixes(parts: Anatomy) -> None:
    """Raise `DeltaTuneError` for a family in which the library's prefixes are another function than deltatune's.

    They do not act where positions are rotary, shift a T5's distances and are seen otherwise in decoders.
    """
    if parts.family not in BERTS:
        raise DeltaTuneError(
            f"prefixes of the library `adapters` are not those of deltatune in {parts.family}; they are in {', '.join(BERTS)}."
        )


def read_loras(model: nn.Module, parts: Anatomy, folder: Folder, found: dict[str, Tensors]) -> list[Part]:
    """Return the low-rank changes and rescalings of a file, by their paths."""
    config = folder.one("lora")
    if config.get("use_gating"):
        raise folder.refuse("says use_gating=True, a gate that is averaged over all positions of a row")
    return [_lora(model, folder, config, resolve(model, at), held) for at, held in found.items()]


def _lora(model: nn.Module, folder: Folder, config: dict[str, Any], path: str, held: Tensors) -> Part:
    module: Any = model.get_submodule(path)
    rank, alpha = config.get("r"), config.get("alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise folder.refuse(f"says r={rank!r} and alpha={alpha!r}, which are no numbers of a LoRA")
    if config.get("composition_mode") == "scale" and held.keys() == {"lora_B"}:
        return Part(path, IA3(), {"l": held["lora_B"] * alpha})
    if not held.keys() >= {"lora_A", "lora_B"} or config.get("composition_mode", "add") != "add":
        raise folder.refuse(f"has {', '.join(held)} at {path!r}, which deltatune has no method for")
    leaves = {"A": held["lora_A"], "B": held["lora_B"]}
    if leaves["A"].shape[0] != rank:
        raise folder.refuse(f"says r={rank}, but {path!r} has {leaves['A'].shape[0]}: several roles are packed there")
    if not config.get("use_dora"):
        return Part(path, LoRA(rank, float(alpha)), leaves)
    if alpha != rank or getattr(module, "bias", None) is not None:
        raise folder.refuse(
            f"says use_dora=True with alpha={alpha} at {path!r}: the library leaves alpha / r out of the norm and rescales the "
            "bias, so that it is DoRA only for alpha = r and without a bias"
        )
    return Part(path, DoRA(rank, float(alpha)), leaves | {"m": held["m.weight"].flatten()})


def prefix_places(parts: Anatomy, left_out: Sequence[int]) -> list[Place]:
    """Return the attentions of the blocks that are not left out, in their order."""
    return [place for place in parts.places if place.role == "attn" and place.layer not in left_out]


def read_prefixes(model: nn.Module, parts: Anatomy, folder: Folder, found: dict[str, Tensors]) -> list[Part]:
    """Return the prefixes of a file; the copies of the pool in every layer are left aside."""
    check_prefixes(parts)
    config = folder.one("prefix_tuning")
    if config.get("use_gating"):
        raise folder.refuse("says use_gating=True, a gate on prefixes that is averaged over all positions of a row")
    pools = [held for at, held in found.items() if not at.endswith(".pool")]
    held = {name.removeprefix(f"{LOCATION}."): tensor for pool in pools for name, tensor in pool.items()}
    return _prefix(folder, config, prefix_places(parts, config.get("leave_out", [])), held)


def _prefix(folder: Folder, config: dict[str, Any], places: list[Place], held: Tensors) -> list[Part]:
    n = config.get("prefix_length")
    if not isinstance(n, int) or n < 1 or not places:
        raise folder.refuse(f"says prefix_length={n!r} for {len(places)} attentions")
    try:
        if config.get("flat"):
            whole = held["control_trans"].view(n, len(places), 2, -1)
            leaves = [{"K": kv[:, 0], "V": kv[:, 1]} for kv in whole.unbind(1)]
            method: Method = PrefixTuning(n)
        else:
            E, W, b = held["wte.weight"], held["control_trans.0.weight"], held["control_trans.0.bias"]
            outer = [held[f"control_trans.2.{end}"].unflatten(0, (len(places), 2, -1)) for end in ("weight", "bias")]
            leaves = [
                {"E": E, "W": W, "b": b, "W_K": w[0], "W_V": w[1], "b_K": c[0], "b_V": c[1]}
                for w, c in zip(outer[0].unbind(0), outer[1].unbind(0), strict=True)
            ]
            if str(config.get("non_linearity")).lower() != "tanh":
                raise folder.refuse(f"says non_linearity={config.get('non_linearity')!r}; an MLP of deltatune has tanh")
            method = Reparam(PrefixTuning(n), MLP(E.shape[1], len(b)))
    except (KeyError, RuntimeError, ValueError) as error:
        if isinstance(error, DeltaTuneError):
            raise
        raise DeltaTuneError(
            f"the prefix beside {folder.source} does not fit {len(places)} attentions of this model: {error}."
        ) from None
    pairs = zip(places, leaves, strict=True)
    return [Part(p.path, method, own, role=p.role) for p, own in pairs]


def read_refts(model: nn.Module, parts: Anatomy, folder: Folder, found: dict[str, Tensors]) -> list[Part]:
    """Return the edits of the hidden states behind blocks."""
    config, parts_ = folder.one("reft"), []
    if config.get("non_linearity") not in (None, "linear"):
        raise folder.refuse(f"says non_linearity={config['non_linearity']!r} for a ReFT, which is linear in deltatune")
    first, last = (int(config.get(f"{end}_positions", 0)) for end in ("prefix", "suffix"))
    spans = [(first, last)] if config.get("tied_weights") else [(first, 0), (0, last)]
    for at, held in found.items():
        path = resolve(model, at.rpartition(".")[0])
        for unit, span in enumerate(spans):
            own = {n.removeprefix(f"units.{unit}."): t for n, t in held.items() if n.startswith(f"units.{unit}.")}
            if sum(span):
                inner, leaves = _reft(folder, config, path, own)
                parts_.append(Part(path, AtPositions(inner, *span), leaves, role="block"))
    return parts_


def _reft(folder: Folder, config: dict[str, Any], path: str, held: Tensors) -> tuple[Method, Tensors]:
    try:
        W, b = held["learned_source.weight"], held["learned_source.bias"]
        if config.get("orthogonality"):
            R = orthogonal_of(
                held["projection.parametrizations.weight.original"], held["projection.parametrizations.weight.0.base"]
            )
            return LoReFT(len(b)), {"R": R, "W": W, "b": b}
        inner = NoReFT(len(b)) if config.get("subtract_projection", True) else DiReFT(len(b))
        return inner, {"W1": W, "W2": held["projection.weight"], "b": b}
    except (KeyError, RuntimeError) as error:
        raise DeltaTuneError(f"the ReFT of {path!r} beside {folder.source} is not whole: {error}.") from None


def orthogonal_of(original: Tensor, base: Tensor) -> Tensor:
    """Return the matrix that torch's parametrization makes of its two tensors; refuses one whose rows are not orthonormal."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        linear: Any = nn.utils.parametrizations.orthogonal(nn.Linear(original.shape[1], original.shape[0], bias=False))
        linear.load_state_dict({"parametrizations.weight.original": original, "parametrizations.weight.0.base": base})
        R = linear.weight.detach().clone()
    if not torch.allclose(R @ R.mT, torch.eye(len(R)), atol=1e-4):
        raise DeltaTuneError(
            "the projection of a LoReFT has rows that are not orthonormal: the signs on the diagonal of its parametrization were "
            "changed, as weight decay does."
        )
    return R
