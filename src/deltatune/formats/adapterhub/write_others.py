"""LoRA, DoRA, (IA)^3, prefixes and ReFT as the library keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.site import Place
from deltatune.errors import DeltaTuneError
from deltatune.formats.adapterhub.others import LOCATION, check_prefixes, prefix_places
from deltatune.formats.adapterhub.places import layer_number
from deltatune.formats.adapterhub.target import Target, Written, one
from deltatune.formats.disk import Tensors
from deltatune.formats.refts import refts_of
from deltatune.formats.seats import Seat
from deltatune.methods.addition.ia3 import IA3
from deltatune.methods.addition.loreft import LoReFT
from deltatune.methods.addition.noreft import NoReFT
from deltatune.methods.addition.prefix_tuning import PrefixTuning
from deltatune.methods.combine.reparam import MLP, Reparam
from deltatune.methods.reparameterization.dora import DoRA
from deltatune.methods.reparameterization.lora import LoRA

LOW_RANK = (LoRA, DoRA, IA3)
LORA: dict[str, Any] = {
    "architecture": "lora", "selfattn_lora": False, "intermediate_lora": False, "output_lora": False, "leave_out": [],
    "dropout": 0.0, "attn_matrices": [], "composition_mode": "add", "init_weights": "lora", "init_weights_seed": None,
    "use_gating": False, "use_dora": False, "vera_d": None, "vera_b": None, "dtype": None,
}  # fmt: skip
# the two linears of a feed-forward by the library's names; in these families it calls the second one the first
FLAGS = {"ffn.up": "intermediate_lora", "ffn.down": "output_lora"}
TURNED = {"ffn.down": "intermediate_lora", "ffn.up": "output_lora"}
PREFIX: dict[str, Any] = {
    "architecture": "prefix_tuning", "encoder_prefix": True, "cross_prefix": True, "leave_out": [], "flat": True,
    "bottleneck_size": 512, "non_linearity": "tanh", "dropout": 0.0, "use_gating": False, "shared_gating": True,
    "init_weights_seed": None,
}  # fmt: skip
REFT: dict[str, Any] = {
    "architecture": "reft", "output_reft": True, "dropout": 0.0, "non_linearity": None, "dtype": None, "init_weights_seed": None,
}  # fmt: skip


def _blocks(target: Target) -> dict[tuple[str, int | None], int]:
    places = target.parts.blocks
    return {(place.stack, place.layer): layer_number(target.parts, place) for place in places}


def write_loras(target: Target, seats: Sequence[Seat]) -> list[Written]:
    """Return the config and tensors of low-rank changes or rescalings, which the library has at whole sets of linears."""
    kind = {type(seat.method) for seat in seats}
    if len(kind) > 1:
        raise DeltaTuneError("the library has LoRA, DoRA or (IA)^3 in one adapter; this delta has several of them.")
    plain = [_plain(seat) for seat in seats]
    rank, alpha = plain[0][:2]
    if any(found[:2] != (rank, alpha) for found in plain):
        raise DeltaTuneError("the library has one rank and one alpha in an adapter; this delta has several.")
    method, numbers = seats[0].method, _blocks(target)
    places = {place.path: place for place in target.parts.places if place.role.count(".") == 1 and place.part is None}
    chosen = _chosen(target, [seat.site.path for seat in seats], places)
    used = {numbers[places[seat.site.path].stack, places[seat.site.path].layer] for seat in seats}
    fields = LORA | chosen | {"r": rank, "alpha": alpha, "leave_out": sorted(set(numbers.values()) - used)}
    if isinstance(method, IA3):
        fields |= {"composition_mode": "scale", "init_weights": "ia3"}
    fields["use_dora"] = isinstance(method, DoRA)
    tensors = {}
    for seat, (_, _, own) in zip(seats, plain, strict=True):
        tensors |= {f"{seat.site.path}.loras.{target.name}.{name}": tensor for name, tensor in own.items()}
    return [(fields, tensors)]


def _plain(seat: Seat) -> tuple[int, float, Tensors]:
    """Return the rank, alpha and tensors of a seat."""
    site, method = seat.site, seat.method
    if site.kind != "linear" or site.part is not None or site.transposed or site.side != "out":
        raise DeltaTuneError(
            f"{method} at {site.address!r} is not written for the library, which has it at whole linear layers."
        )
    if isinstance(method, IA3):
        return 1, 1, {"lora_B": seat.leaves["l"]}
    p = seat.unfolded
    rank = p["A"].shape[0]
    alpha = method.alpha / method.rank * rank
    tensors = {"lora_A": p["A"], "lora_B": p["B"]}
    if isinstance(method, DoRA):
        if alpha != rank or site.bias:
            raise DeltaTuneError(
                f"the library's DoRA leaves alpha / r out of the norm and rescales the bias; {method} at {site.path!r} is the same "
                f"for alpha={rank} and without a bias alone."
            )
        tensors["m.weight"] = p["m"].flatten()[:, None]
    return rank, int(alpha) if alpha == int(alpha) else alpha, tensors


def _chosen(target: Target, paths: list[str], places: dict[str, Place]) -> dict[str, Any]:
    """Return the fields that choose exactly these linears; raises `DeltaTuneError` when none do."""
    flags = TURNED if target.parts.family in ("llama", "mistral") else FLAGS
    roles = {places[path].role for path in paths if path in places}
    matrices = [m for m in "qkv" if roles & {f"attn.{m}", f"cross.{m}"}]
    fields: dict[str, Any] = {flags[role]: True for role in flags if role in roles}
    fields |= {"selfattn_lora": bool(matrices), "attn_matrices": matrices}
    meant = {
        *(f"{kind}.{m}" for kind in ("attn", "cross") for m in matrices),
        *(role for role in flags if role in roles),
    }
    used = {(places[path].stack, places[path].layer) for path in paths if path in places}
    wanted = {path for path, place in places.items() if place.role in meant and (place.stack, place.layer) in used}
    if wanted != set(paths):
        odd = sorted(wanted ^ set(paths))[0]
        raise DeltaTuneError(
            "the library has such a change at the same projections of every attention, cross attention included, and at the "
            f"linears of the feed-forward; {odd!r} breaks that rule."
        )
    return fields


def write_prefixes(target: Target, seats: Sequence[Seat]) -> list[Written]:
    """Return the config and tensors of prefixes, flat or through a network for each location."""
    check_prefixes(target.parts)
    method = one(seats, "prefix")
    inner: Any = method.inner if isinstance(method, Reparam) else method
    used = {seat.site.layer for seat in seats}
    left_out = sorted(layer for layer in range(target.parts.stacks[0].layers) if layer not in used)
    if [seat.site.path for seat in seats] != [place.path for place in prefix_places(target.parts, left_out)]:
        raise DeltaTuneError(
            f"the library has one prefix in an attention; this delta has {len(seats)} in {len(used)} blocks."
        )
    key = f"{target.root}prefix_tuning.prefix_tunings.{target.name}.{LOCATION}."
    tensors = {key + name: tensor for name, tensor in _prefix(target, method, [seat.leaves for seat in seats]).items()}
    sizes: dict[str, Any] = {"prefix_length": inner.length, "leave_out": left_out}
    if isinstance(method, Reparam):
        through: Any = method.through
        sizes |= {"flat": False, "bottleneck_size": through.hidden}
    return [(PREFIX | sizes, tensors)]


def _prefix(target: Target, method: Any, own: list[Tensors]) -> Tensors:
    """Return the tensors of one location."""
    if not isinstance(method, Reparam):
        return {"control_trans": torch.stack([torch.stack([p["K"], p["V"]], 1) for p in own], 1).flatten()}
    if not isinstance(method.through, MLP) or method.through.size != target.hidden:
        raise DeltaTuneError(
            f"the library has prefixes through an MLP as wide as the model, MLP(size={target.hidden}); this delta has {method}. "
            "Write what dt.flatten(model, weights) makes of it."
        )
    first = own[0]
    outer = {end: torch.cat([p[f"{end}_{side}"] for p in own for side in "KV"]) for end in "Wb"}
    inner = {"wte.weight": first["E"], "control_trans.0.weight": first["W"], "control_trans.0.bias": first["b"]}
    return inner | {"control_trans.2.weight": outer["W"], "control_trans.2.bias": outer["b"]}


def is_prefix(method: Any) -> bool:
    """Whether a method is a prefix, or one that a network makes."""
    return isinstance(method.inner if isinstance(method, Reparam) else method, PrefixTuning)


def write_refts(target: Target, seats: Sequence[Seat]) -> list[Written]:
    """Return the config and tensors of ReFT: one unit for both ends of a text, or one for each."""
    but = ", and loads its own DiReFT as NoReFT, as its files do not tell them apart"
    methods = refts_of(seats, "the library", (LoReFT, NoReFT), but)
    inners: list[Any] = [method.inner for method in methods]
    if len({inner.rank for inner in inners}) > 1:
        raise DeltaTuneError(
            f"the library has one rank of ReFT in an adapter; this delta has {' + '.join(map(str, methods))}."
        )
    numbers, tensors = _blocks(target), {}
    if any(seat.site.role != "block" or seat.site.side != "out" for seat in seats):
        raise DeltaTuneError("the library has ReFT behind blocks.")
    layers = {numbers[seat.site.stack, seat.site.layer] for seat in seats}
    for seat in seats:
        key = f"{seat.site.path}.reft_layer.refts.{target.name}.units.{methods.index(seat.method)}."
        tensors |= {key + name: tensor for name, tensor in _unit(seat).items()}
    fields = {
        "layers": "all" if layers == set(numbers.values()) else sorted(layers),
        "prefix_positions": methods[0].first,
        "suffix_positions": methods[-1].last,
        "tied_weights": len(methods) == 1,
    }
    kind = {"r": inners[0].rank, "orthogonality": isinstance(inners[0], LoReFT)}
    return [(REFT | fields | kind, tensors)]


def _unit(seat: Seat) -> Tensors:
    p = seat.unfolded
    if "R" not in p:
        return {"learned_source.weight": p["W1"], "learned_source.bias": p["b"], "projection.weight": p["W2"]}
    source = {"learned_source.weight": p["W"], "learned_source.bias": p["b"]}
    return source | {
        f"projection.parametrizations.weight.{name}": tensor for name, tensor in parametrized(p["R"]).items()
    }


def parametrized(R: Tensor) -> Tensors:
    """Return the two tensors of which torch's parametrization makes R, whose rows are orthonormal."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        linear: Any = nn.utils.parametrizations.orthogonal(nn.Linear(R.shape[1], R.shape[0], bias=False))
        linear.weight = R
        state = linear.state_dict()
    return {name.removeprefix("parametrizations.weight."): tensor.clone() for name, tensor in state.items()}
