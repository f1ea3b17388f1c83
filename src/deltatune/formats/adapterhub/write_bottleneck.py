"""Bottlenecks as the library keeps them: one config for every kind of adapter, and which blocks it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltatune.errors import DeltaTuneError
from deltatune.formats.adapterhub.bottleneck import ACTIVATIONS, table_of
from deltatune.formats.adapterhub.places import FLAGS, Spot, key_of, layer_number, spots
from deltatune.formats.adapterhub.target import Target, Written
from deltatune.formats.disk import Tensors
from deltatune.formats.seats import Seat
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.add_norm_adapter import AddNormAdapter
from deltatune.methods.addition.compacter import Compacter
from deltatune.methods.addition.invertible import InvertibleAdapter
from deltatune.methods.addition.parallel_adapter import ParallelAdapter

METHODS = (Adapter, AddNormAdapter, ParallelAdapter, Compacter)
BASE: dict[str, Any] = {
    "mh_adapter": False, "output_adapter": False, "cross_adapter": False, "original_ln_before": False,
    "original_ln_after": True, "ln_before": False, "ln_after": False, "init_weights": "bert", "init_weights_seed": None,
    "is_parallel": False, "scaling": 1.0, "use_gating": False, "residual_before_ln": True,
    "adapter_residual_before_ln": False, "inv_adapter": None, "inv_adapter_reduction_factor": None, "leave_out": [],
    "dropout": 0.0, "phm_layer": False, "phm_dim": 4, "factorized_phm_W": True, "shared_W_phm": False,
    "shared_phm_rule": True, "factorized_phm_rule": False, "phm_c_init": "normal", "phm_init_range": 0.0001,
    "learn_phm": True, "hypercomplex_nonlinearity": "glorot-uniform", "phm_rank": 1, "phm_bias": True,
    "stochastic_depth": 0.0,
}  # fmt: skip
STYLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"original_ln_before": True},
    "norm": {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False},
    "parallel": {"is_parallel": True},
}
NAMES = {"D": "adapter_down.0.weight", "d": "adapter_down.0.bias", "U": "adapter_up.weight", "u": "adapter_up.bias"}
FACTORS = {
    "Ds": "adapter_down.0.W_left", "Dt": "adapter_down.0.W_right", "d": "adapter_down.0.b",
    "Us": "adapter_up.W_left", "Ut": "adapter_up.W_right", "u": "adapter_up.b",
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What one config says of an adapter."""

    style: str
    size: int
    activation: str
    scaling: float = 1.0
    phm: tuple[int, int] = (0, 0)

    def config(self, hidden: int) -> dict[str, Any]:
        """Return the config's fields."""
        back = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        factor = hidden / self.size if hidden % self.size == 0 else hidden / (self.size + 0.5)
        fields = BASE | STYLES[self.style] | {"non_linearity": back[self.activation], "reduction_factor": factor}
        if self.phm[0]:
            fields |= {"phm_layer": True, "phm_dim": self.phm[0], "phm_rank": self.phm[1]}
        return fields | {"scaling": float(self.scaling)}


def write_bottlenecks(target: Target, seats: Sequence[Seat]) -> list[Written]:
    """Return the configs and tensors of bottlenecks; raises `DeltaTuneError` for places where the library has none."""
    held: dict[tuple[str, int], tuple[Look, Spot, Tensors]] = {}
    for seat in seats:
        spot = _spot(target, seat)
        where = (spot.kind, layer_number(target.parts, spot.block))
        if where in held:
            raise DeltaTuneError(
                f"the library has one adapter at a sub-layer; this delta has several at {spot.sublayer!r}."
            )
        held[where] = (_look(target, seat, spot), spot, _tensors(seat))
    rules = [own["A"] for _, _, own in held.values() if "A" in own]
    if any(not torch.equal(rule, rules[0]) for rule in rules):
        raise DeltaTuneError("the library's Compacters share one rule; this delta has several terms with a rule each.")
    looks: dict[Look, dict[str, set[int]]] = {}
    tensors: dict[Look, Tensors] = {}
    for (kind, number), (look, spot, own) in held.items():
        looks.setdefault(look, {}).setdefault(kind, set()).add(number)
        key = f"{key_of(target.parts, spot)}.adapters.{target.name}."
        tensors.setdefault(look, {}).update(
            {
                f"{target.root}shared_parameters.{target.name}.phm_rule" if name == "A" else key + name: t
                for name, t in own.items()
            }
        )
    written = []
    for look, kinds in looks.items():
        fields = look.config(target.hidden)
        for i, (flags, left_out) in enumerate(_configs(target, kinds)):
            written.append((fields | flags | {"leave_out": left_out}, {} if i else tensors[look]))
    return written


def _configs(target: Target, kinds: dict[str, set[int]]) -> list[tuple[dict[str, bool], list[int]]]:
    """Return flags and blocks left out of the fewest configs that stand for these kinds at these blocks."""
    there: dict[str, set[int]] = {}
    for spot in spots(target.parts):
        there.setdefault(spot.kind, set()).add(layer_number(target.parts, spot.block))
    everywhere = set().union(*there.values())
    used = set().union(*kinds.values())
    if all(there[kind] & used == own for kind, own in kinds.items()):
        return [({FLAGS[kind]: True for kind in kinds}, sorted(everywhere - used))]
    return [({FLAGS[kind]: True}, sorted(everywhere - own)) for kind, own in kinds.items()]


def _spot(target: Target, seat: Seat) -> Spot:
    """Return the sub-layer whose adapter a seat is."""
    site, method = seat.site, seat.method
    for spot in spots(target.parts):
        branch = isinstance(method, AddNormAdapter | ParallelAdapter)
        block = spot.block.path if spot.norm is None and spot.kind == "ffn" else None
        places = (spot.sublayer,) if branch else (spot.last, spot.norm, block)
        if site.path in places and site.side == "out" and (not branch or spot.norm is not None):
            return spot
    raise DeltaTuneError(
        f"the library has no place for {method} at {site.address!r} of a {target.parts.family}; it has adapters behind "
        f"attention and the feed-forward{'' if spots(target.parts)[0].norm else ', or behind blocks'}."
    )


def _look(target: Target, seat: Seat, spot: Spot) -> Look:
    method = seat.method
    if getattr(method, "activation", "gelu_tanh") == "identity":
        raise DeltaTuneError(f"the library has no {method} without an activation.")
    if isinstance(method, Compacter):
        if seat.site.path != spot.last:
            raise DeltaTuneError(
                f"{method} is written behind a sub-layer's last linear layer; it is at {seat.site.address!r}."
            )
        return Look("plain", method.size, "gelu_tanh", phm=(method.n, method.rank))
    if isinstance(method, ParallelAdapter):
        scale = 1.0 if "scale" in seat.leaves else float(method.scale)  # type: ignore[arg-type]
        return Look("parallel", method.size, method.activation, scale)
    if isinstance(method, AddNormAdapter):
        norm: Any = target.model.get_submodule(spot.norm or "")
        same = torch.equal(seat.leaves["g"], norm.weight.detach().float().cpu())
        if not same or not torch.equal(seat.leaves["b"], norm.bias.detach().float().cpu()) or norm.eps != method.eps:
            raise DeltaTuneError(
                f"{method} at {seat.site.address!r} norms by numbers of its own; the library's reads the backbone's {spot.norm!r}."
            )
        return Look("sum", method.size, method.activation)
    style = {spot.last: "plain", spot.norm: "norm"}.get(seat.site.path, "sum")
    return Look(style, method.size, method.activation)


def _tensors(seat: Seat) -> Tensors:
    if isinstance(seat.method, Compacter):
        return {name: seat.leaves[leaf] for leaf, name in FACTORS.items()} | {"A": seat.leaves["A"]}
    s = seat.leaves.get("scale", torch.ones(1))
    return {name: seat.leaves[leaf] * (s if leaf in "Uu" else 1) for leaf, name in NAMES.items()}


def write_invertible(target: Target, seats: Sequence[Seat]) -> list[Written]:
    """Return the config and tensors of an invertible adapter behind the embeddings, without its inverse."""
    path = table_of(target.model, target.parts)
    if [seat.site.path for seat in seats] != [path]:
        raise DeltaTuneError(
            f"the library has an invertible adapter behind {path!r} alone, and its inverse in heads of its own; this delta has it "
            f'at {", ".join(seat.site.address for seat in seats)}. Write .at("path:{path}").'
        )
    key = f"{target.root}invertible_adapters.{target.name}."
    tensors = {}
    for net in "FG":
        for i, at in (("1", 0), ("2", 2)):
            tensors[f"{key}{net}.{at}.weight"] = seats[0].leaves[f"{net}{i}"]
            tensors[f"{key}{net}.{at}.bias"] = seats[0].leaves[f"{net.lower()}{i}"]
    fields = {"non_linearity": "relu", "reduction_factor": 16, "inv_adapter": "nice", "inv_adapter_reduction_factor": 2}
    # the library takes two configs of bottlenecks for one only where blocks are left out; here, all of them
    left_out = sorted({layer_number(target.parts, spot.block) for spot in spots(target.parts)})
    return [(BASE | fields | {"leave_out": left_out}, tensors)]


INVERTIBLE = (InvertibleAdapter,)
