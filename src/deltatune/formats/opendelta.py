"""OpenDelta's folders, read: `config.json` and `pytorch_model.bin`, a state dict of what it trained, by the backbone's own names.

What reader and writer (`opendelta_write`) both know of them is here.

X.lora.lora_A, lora_B                                   `LoRA` at X (a second one: X.lora_1)
X.adapter.modulelist.down_proj, up_proj                 `Adapter` behind X
X.parallel_adapter.modulelist...                        `ParallelAdapter` from what goes into X to what X, or its pair, returns
X.compactor.down_sampler.phm_rule, W_left, W_right, b   `Adapter` behind X, multiplied out: each matrix has a rule of its own
X.low_rank_adapter.down_sampler.W_left, W_right, b      `LowRankAdapter` behind X, of rank one: OpenDelta fails for others
X.bias, X.bitfit.bias                                   `BitFit` at X, of the difference to the model's own bias
soft_prompt_layer.soft_embeds                           `PromptTuning`, where a prompt does not move the text; with two stacks
                                                        under `encoder.`
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.site import Anatomy, Place, anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.files import read_json
from deltatune.formats.disk import Tensors, read_tensors_of_pickle, state_dict
from deltatune.formats.guard import reading
from deltatune.formats.parts import Part, assemble
from deltatune.formats.paths import resolve, role_at
from deltatune.formats.peft.prompts import stack_of
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.low_rank_adapter import LowRankAdapter
from deltatune.methods.addition.parallel_adapter import ParallelAdapter
from deltatune.methods.addition.prompt_tuning import PromptTuning
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.methods.specification.bitfit import BitFit

CONFIG, TENSORS = "config.json", "pytorch_model.bin"
NAMED = re.compile(
    r"(?:(?P<path>.+?)\.)?(?P<kind>lora|adapter|parallel_adapter|compactor|low_rank_adapter|bitfit|reparams|soft_prompt_layer)"
    r"(?:_(?P<again>\d+))?\.(?P<rest>.+)"
)
ACTIVATIONS = {  # of several names for one, the first is written: with a new transformers, OpenDelta fails for "gelu" and "silu"
    "relu": "relu", "gelu_orig": "gelu", "gelu": "gelu", "gelu_new": "gelu_tanh", "swish": "silu", "silu": "silu",
    "tanh": "tanh", "leakyrelu": "leaky_relu",
}  # fmt: skip
FACTORS = {"A": "lora_A", "B": "lora_B"}
BOTTLENECK = {
    "D": "modulelist.down_proj.weight", "d": "modulelist.down_proj.bias",
    "U": "modulelist.up_proj.weight", "u": "modulelist.up_proj.bias",
}  # fmt: skip
SAMPLERS = {"D": "down_sampler", "U": "up_sampler"}
PROMPT = "soft_prompt_layer.soft_embeds"
Config = Mapping[str, Any]


def is_opendelta(path: Path) -> bool:
    """Whether a path is a folder of OpenDelta."""
    if not (path / CONFIG).is_file():
        return False
    try:
        config = read_json(path / CONFIG)
    except DeltaTuneError:
        return False
    return isinstance(config, dict) and "delta_type" in config


def read_opendelta(model: nn.Module, folder: Path | str, check: bool = True) -> Weights:
    """Read a folder of OpenDelta as weights for `model`; raises `DeltaTuneError` for what deltatune cannot compute in the same way."""
    with reading("OpenDelta", folder):
        return _read_weights(model, Path(folder))


def _read_weights(model: nn.Module, folder: Path) -> Weights:
    if not is_opendelta(folder):
        raise DeltaTuneError(f"{folder} is not a folder of OpenDelta: it has no {CONFIG} with a delta_type in it.")
    config, parts = read_json(folder / CONFIG), anatomy(model)
    if not (folder / TENSORS).is_file():
        raise DeltaTuneError(f"there is no {TENSORS} in {folder}, beside its {CONFIG}.")
    tensors = state_dict(read_tensors_of_pickle(folder / TENSORS), folder / TENSORS)
    found: dict[tuple[str, str, int], Tensors] = {}
    read = []
    for key, tensor in tensors.items():
        named = NAMED.fullmatch(key)
        if named is None:
            read.append(_bias(model, key, tensor))
        else:
            place = (named["kind"], named["path"] or "", int(named["again"] or 0))
            found.setdefault(place, {})[named["rest"]] = tensor
    for (kind, path, again), held in found.items():
        try:
            read += [replace(p, group=str(again or "")) for p in KINDS[kind](model, parts, config, path, held)]
        except (KeyError, IndexError, RuntimeError) as error:
            raise DeltaTuneError(f"the {kind} at {path!r} in {folder / TENSORS} is not whole: {error}.") from None
    if not read:
        raise DeltaTuneError(f"{folder / TENSORS} holds no tensors.")
    return assemble(model, parts, read)


def _activation(config: Config) -> str:
    name = str(config.get("non_linearity", "gelu_new")).lower()
    if name not in ACTIVATIONS:
        raise DeltaTuneError(f"OpenDelta's config has the activation {name!r}; known are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _lora(model: nn.Module, parts: Anatomy, config: Config, path: str, held: Tensors) -> list[Part]:
    rank, alpha = config.get("lora_r", 8), config.get("lora_alpha", 16)
    if not isinstance(alpha, int | float) or held["lora_A"].shape[0] != rank:
        raise DeltaTuneError(
            f"OpenDelta's config says lora_r={rank!r} and lora_alpha={alpha!r}; {path!r} has the rank {held['lora_A'].shape[0]}."
        )
    return [Part(resolve(model, path), LoRA(rank, float(alpha)), {leaf: held[name] for leaf, name in FACTORS.items()})]


def _behind(model: nn.Module, parts: Anatomy, path: str, method: Any, leaves: Tensors) -> list[Part]:
    """Return a method behind a module, by its role where no linear or norm tells the width."""
    path = resolve(model, path)
    return [Part(path, method, leaves, role=role_at(parts, path, "attn", "cross", "ffn", "block"))]


def _bottleneck(held: Tensors) -> Tensors:
    return {leaf: held[name] for leaf, name in BOTTLENECK.items()}


def _adapter(model: nn.Module, parts: Anatomy, config: Config, path: str, held: Tensors) -> list[Part]:
    leaves = _bottleneck(held)
    return _behind(model, parts, path, Adapter(len(leaves["d"]), _activation(config)), leaves)


def _parallel(model: nn.Module, parts: Anatomy, config: Config, path: str, held: Tensors) -> list[Part]:
    """Return an adapter from one module to another; the config's `scaled` is left aside, as OpenDelta leaves it."""
    leaves, path, end = _bottleneck(held), resolve(model, path), _end(config, path)
    method = ParallelAdapter(len(leaves["d"]), 1.0, _activation(config))
    for place in parts.places:
        firsts, lasts = _ends(parts, place)
        if path in firsts and (end is None or any(_named(last, end) for last in lasts)):
            return [Part(place.path, method, leaves, role=place.role)]
    if end is None or _named(path, end):
        return _behind(model, parts, path, method, leaves)
    raise DeltaTuneError(
        f"the file has a parallel adapter from {path!r} to {end!r}, which are the ends of no sub-layer; deltatune has one beside "
        "whole sub-layers, or around a module."
    )


def _end(config: Config, path: str) -> str | None:
    """Return the second of the pair of modules whose first is at a path; none where the config has no names of modules."""
    names = [str(name) for name in config.get("modified_modules") or ()]
    return next((end for first, end in zip(names[::2], names[1::2], strict=False) if _named(path, first)), None)


def _named(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}")


def _ends(parts: Anatomy, place: Place) -> tuple[set[str], set[str]]:
    """Return the modules that see what goes into a sub-layer, and those that return what comes out of it."""
    if place.role not in ("attn", "cross", "ffn"):
        return set(), set()
    own = [p for p in parts.places if (p.stack, p.layer) == (place.stack, place.layer)] if place.role == "ffn" else []
    firsts = {p.path for p in own if p.role in ("ffn.gate", "ffn.up")}
    return {place.path, *firsts}, {place.exit or place.path, *(p.path for p in own if p.role == "ffn.down")}


def _compacter(model: nn.Module, parts: Anatomy, config: Config, path: str, held: Tensors) -> list[Part]:
    D, U = (_product(held, side).mT for side in SAMPLERS.values())
    leaves = {"D": D, "d": _shift(held, "down_sampler", len(D)), "U": U, "u": _shift(held, "up_sampler", len(U))}
    return _behind(model, parts, path, Adapter(len(D), _activation(config)), leaves)


def _product(held: Tensors, side: str) -> Tensor:
    rule, W = _factored(held, f"{side}.phm_rule"), _factored(held, f"{side}.W")
    if rule.dim() != 3 or W.dim() != 3 or len(rule) != len(W):
        raise DeltaTuneError(f"{side} has a rule {tuple(rule.shape)} and matrices {tuple(W.shape)}, which do not fit.")
    return torch.stack([torch.kron(a, b) for a, b in zip(rule.unbind(), W.unbind(), strict=True)]).sum(0)


def _factored(held: Tensors, name: str) -> Tensor:
    return held[f"{name}_left"] @ held[f"{name}_right"] if f"{name}_left" in held else held[name]


def _shift(held: Tensors, side: str, width: int) -> Tensor:
    return held.get(f"{side}.b", torch.zeros(width))


def _low_rank(model: nn.Module, parts: Anatomy, config: Config, path: str, held: Tensors) -> list[Part]:
    down, up = ([held[f"{side}.W_{end}"].mT for end in ("left", "right")] for side in SAMPLERS.values())
    if len(down[0]) != 1:
        raise DeltaTuneError(
            f"the file has a low_rank_adapter of rank {len(down[0])}; OpenDelta computes rank 1 alone."
        )
    d, u = _shift(held, "down_sampler", len(down[1])), _shift(held, "up_sampler", len(up[1]))
    if _activation(config) != "gelu_tanh":
        leaves = {"D": down[1] @ down[0], "d": d, "U": up[1] @ up[0], "u": u}
        return _behind(model, parts, path, Adapter(len(d), _activation(config)), leaves)
    leaves = {"D1": down[1], "D2": down[0], "U1": up[1], "U2": up[0], "d": d, "u": u}
    return _behind(model, parts, path, LowRankAdapter(len(d), 1), leaves)


def _added(model: nn.Module, parts: Anatomy, config: Config, path: str, held: Tensors) -> list[Part]:
    return [Part(resolve(model, path), BitFit(), {"b": held["bias"]})]


def _prefix(model: nn.Module, parts: Anatomy, config: Config, path: str, held: Tensors) -> list[Part]:
    raise DeltaTuneError(
        f"the file has a prefix at {path!r}; OpenDelta counts it among the positions of the text, and deltatune does not."
    )


def _prompt(model: nn.Module, parts: Anatomy, config: Config, path: str, held: Tensors) -> list[Part]:
    stack, P = stack_of(model, "OpenDelta's soft_prompt"), held["soft_embeds"]
    return [Part(stack.embed or "", PromptTuning(len(P)), {"P": P}, where="input.embed")]


def _bias(model: nn.Module, key: str, value: Tensor) -> Part:
    path, _, name = key.rpartition(".")
    if name != "bias":
        raise DeltaTuneError(
            f"the file holds {key!r}, a parameter of the backbone that OpenDelta trained whole; only biases are read so."
        )
    path = resolve(model, path)
    own: Any = model.get_submodule(path)._parameters.get("bias")
    return Part(path, BitFit(), {"b": value if own is None else value - own.detach().to("cpu", torch.float32)})


KINDS = {
    "lora": _lora,
    "adapter": _adapter,
    "parallel_adapter": _parallel,
    "compactor": _compacter,
    "low_rank_adapter": _low_rank,
    "bitfit": _added,
    "reparams": _prefix,
    "soft_prompt_layer": _prompt,
}
