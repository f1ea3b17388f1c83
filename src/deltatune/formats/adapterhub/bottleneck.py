"""Bottlenecks: sequential, parallel, on the normed sum (Pfeiffer), of Kronecker products (Compacter), and the invertible ones.

d: the sub-layer's output   x: what went into it, and the residual where norms come behind   A: the bottleneck   s: scaling

original_ln_before, _after   residual_before_ln     norms behind                    norms before
no, yes                      any                    d + s A(d)                      d + s A(d)
yes, yes                     yes                    d + s A(norm(d + x))            d + x + s A(d + x), of a whole block
yes, no                      no                     z + s A(z), z = norm(d + x)     the same
parallel                                            d + s A(x)                      x before its norm: not expressed
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.site import Anatomy
from deltatune.errors import DeltaTuneError
from deltatune.formats.adapterhub.folder import Folder
from deltatune.formats.adapterhub.places import BEHIND, FLAGS, LAST, Spot, spot_of
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.paths import resolve
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.add_norm_adapter import AddNormAdapter
from deltatune.methods.addition.compacter import Compacter
from deltatune.methods.addition.invertible import InvertibleAdapter
from deltatune.methods.addition.parallel_adapter import ParallelAdapter

ACTIVATIONS = {
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "swish": "silu", "silu": "silu", "tanh": "tanh",
    "leakyrelu": "leaky_relu", "linear": "identity",
}  # fmt: skip
REFUSED = {
    "ln_before": "a norm of its own in front of the bottleneck",
    "ln_after": "a norm of its own behind the bottleneck",
    "use_gating": "a gate that is averaged over all positions of a row, padding included",
    "shared_W_phm": "one pair of matrices for all adapters",
    "factorized_phm_rule": "a rule in factors",
}


def read_bottlenecks(model: nn.Module, parts: Anatomy, folder: Folder, found: dict[str, Tensors]) -> list[Part]:
    """Return the bottlenecks of a file, by their paths."""
    rules = {name: t for key, t in folder.tensors.items() if (name := key.rpartition(".")[2]) == "phm_rule"}
    parts_ = []
    for at, held in found.items():
        spot = spot_of(model, parts, at)
        config = folder.one(None, location=FLAGS[spot.kind])
        parts_.append(_read(model, parts, folder, config, spot, held | rules))
    return parts_


def activation(folder: Folder, config: dict[str, Any]) -> str:
    """Return our name of the config's activation."""
    name = str(config.get("non_linearity")).lower()
    if name not in ACTIVATIONS:
        raise folder.refuse(f"has the activation {name!r}; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _read(model: nn.Module, parts: Anatomy, folder: Folder, config: dict[str, Any], spot: Spot, held: Tensors) -> Part:
    for name, what in REFUSED.items():
        if config.get(name):
            raise folder.refuse(f"says {name}={config[name]!r}, {what}, which deltatune has no method for")
    act, scaling = activation(folder, config), config.get("scaling", 1.0)
    if config.get("is_parallel"):
        if spot.norm is None:
            raise folder.refuse(f"is parallel; in {parts.family} it reads what goes into a norm, and no place is there")
        scale = float(scaling) if isinstance(scaling, int | float) else 1.0
        leaves = _matrices(folder, config | {"scaling": 1.0}, spot, held)
        return Part(spot.sublayer, ParallelAdapter(leaves["D"].shape[0], scale, act), leaves, role=spot.kind)
    leaves = _matrices(folder, config, spot, held)
    size = leaves["D"].shape[0]
    before, after = bool(config.get("original_ln_before")), bool(config.get("original_ln_after", True))
    residual = config.get("residual_before_ln", True)
    if not before and after:
        if act == "gelu_tanh" and config.get("phm_layer"):
            return _compacter(config, spot, held)
        return Part(spot.last, Adapter(size, act), leaves, role=LAST[spot.kind])
    if (before, after, residual) == (True, True, True) and spot.norm is not None:
        norm: Any = model.get_submodule(spot.norm)
        own = {"g": norm.weight.detach().float(), "b": norm.bias.detach().float()}
        return Part(spot.sublayer, AddNormAdapter(size, act, norm.eps), leaves | own, role=spot.kind)
    if (before, after, residual) == (True, False, False) and spot.norm is not None:
        return Part(spot.norm, Adapter(size, act), leaves)
    if before and after is residual and spot.norm is None and spot.kind == "ffn":
        return Part(spot.block.path, Adapter(size, act), leaves, role="block")
    raise folder.refuse(
        f"says original_ln_before={before}, original_ln_after={after} and residual_before_ln={residual!r} at "
        f"{spot.sublayer!r}, which is no place of an adapter in deltatune"
    )


def _matrices(folder: Folder, config: dict[str, Any], spot: Spot, held: Tensors) -> Tensors:
    """Return D, d, U and u; Kronecker products multiplied out, and the scaling in U and u."""
    try:
        if config.get("phm_layer"):
            D, U = (_product(held, side).mT for side in ("adapter_down.0", "adapter_up"))
            d, u = held["adapter_down.0.b"], held["adapter_up.b"]
        else:
            D, d = held["adapter_down.0.weight"], held["adapter_down.0.bias"]
            U, u = held["adapter_up.weight"], held["adapter_up.bias"]
    except KeyError as error:
        raise DeltaTuneError(f"the adapter at {spot.sublayer!r} lacks {error}; it has {', '.join(held)}.") from None
    scaling = held.get("scaling", config.get("scaling", 1.0))
    if not isinstance(scaling, Tensor | float | int):
        raise folder.refuse(f"says scaling={scaling!r}, but the file has no such tensor")
    s = torch.as_tensor(scaling, dtype=torch.float32)
    if U.dim() != 2 or u.dim() != 1 or s.numel() not in (1, len(u)):
        raise DeltaTuneError(f"the adapter at {spot.sublayer!r} has matrices of shapes that do not fit.")
    return {"D": D, "d": d, "U": U * s.view(-1, 1), "u": u * s}


def _product(held: Tensors, side: str) -> Tensor:
    """Return the sum of the Kronecker products of the rule and a side's matrices, [in, out]."""
    rule = held.get(f"{side}.phm_rule", held.get("phm_rule"))
    W = held[f"{side}.W_left"] @ held[f"{side}.W_right"] if f"{side}.W_left" in held else held[f"{side}.W"]
    if rule is None or rule.dim() != 3 or W.dim() != 3 or len(rule) != len(W):
        raise KeyError("phm_rule")
    return torch.stack([torch.kron(a, b) for a, b in zip(rule.unbind(), W.unbind(), strict=True)]).sum(0)


def _compacter(config: dict[str, Any], spot: Spot, held: Tensors) -> Part:
    names = {
        "Ds": "adapter_down.0.W_left",
        "Dt": "adapter_down.0.W_right",
        "Us": "adapter_up.W_left",
        "Ut": "adapter_up.W_right",
    }
    names |= {"d": "adapter_down.0.b", "u": "adapter_up.b", "A": "phm_rule"}
    leaves = {leaf: held[name] for leaf, name in names.items()}
    method = Compacter(len(leaves["d"]), len(leaves["A"]), rank=leaves["Ds"].shape[-1])
    return Part(spot.last, method, leaves, role=LAST[spot.kind])


def read_invertible(model: nn.Module, parts: Anatomy, folder: Folder, found: dict[str, Tensors]) -> list[Part]:
    """Return the invertible adapter behind the embeddings; the library has its inverse in heads of its own alone."""
    config = folder.one(None, location="inv_adapter")
    if config["inv_adapter"] != "nice" or activation(folder, config) != "relu":
        raise folder.refuse("has an invertible adapter that is not a NICE coupling with relu; deltatune has that one")
    ((_, held),) = found.items()
    names = {f"{net}{i}": f"{net}.{at}.weight" for net in "FG" for i, at in (("1", 0), ("2", 2))}
    names |= {leaf.lower(): name.replace("weight", "bias") for leaf, name in names.items()}
    try:
        leaves = {leaf: held[name] for leaf, name in names.items()}
    except KeyError as error:
        raise DeltaTuneError(f"the invertible adapter lacks {error}; it has {', '.join(held)}.") from None
    path = table_of(model, parts)
    return [Part(path, InvertibleAdapter(), leaves, where=f"path:{path}")]


def table_of(model: nn.Module, parts: Anatomy) -> str:
    """Return the module that hands the embeddings on to the first block."""
    if parts.family in BEHIND and BEHIND[parts.family].get("attn") == "attention.output.LayerNorm":
        return resolve(model, "embeddings.LayerNorm")
    if parts.family in ("llama", "mistral"):
        return next(place.path for place in parts.places if place.role == "embed")
    raise DeltaTuneError(f"where the library puts an invertible adapter in {parts.family} is not known here.")
