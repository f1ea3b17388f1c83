"""Merging: a delta written into the backbone's own tensors. Computed in float32, cast once; the way back is to keep the originals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.core.attach import Attachment, key, tensors_of
from deltatune.core.delta import Placement, place
from deltatune.core.fit import check_backbone, check_tensors
from deltatune.core.method import OnLinear
from deltatune.core.ports import Tensors
from deltatune.core.site import Site
from deltatune.core.weights import Weights, fingerprint, generate
from deltatune.errors import DeltaTuneError

Change = dict[tuple[str, str], Tensor]


def merge(model: nn.Module, what: Weights | Attachment, untie: bool = False, check: bool = True) -> dict[str, Tensor]:
    """Return `{parameter path: new tensor}` for every parameter that the delta changes; the model is not touched.

    `untie=True` allows a new tensor for one of several places that share a parameter, and `check=False` a backbone of
    the same structure with other values. Raises `DeltaTuneError` for weights of another backbone, for a method that no
    weight can express, and when a value overflows the backbone's dtype.
    """
    weights = what.weights if isinstance(what, Attachment) else what
    check_backbone(weights.backbone, fingerprint(model), check)
    placements = place(model, weights.delta)
    for placement in placements:
        if "merge" in placement.method.breaks:
            raise DeltaTuneError(
                f"{placement.method} cannot be merged: {placement.method.breaks['merge']}. Keep it attached."
            )
    check_tensors(weights, placements)
    holder = _holder(model, weights, placements)
    changed: Change = {}
    for placement in placements:
        _apply(model, placement, tensors_of(placement, holder), changed)
    _check_ties(model, changed, untie)
    return {".".join(filter(None, place)): _cast(model, place, tensor) for place, tensor in changed.items()}


def _holder(model: nn.Module, weights: Weights, placements: list[Placement]) -> nn.Module:
    holder = nn.Module()
    for name, tensor in {**generate(model, placements, weights.seed, "seeded", {}), **weights.held}.items():
        holder.register_buffer(key(name), tensor)
    return holder


@torch.no_grad()
def _apply(model: nn.Module, placement: Placement, tensors: Tensors, changed: Change) -> None:
    site, method = placement.site, cast(Any, placement.method.computes)
    if method.acts == "tensor":
        for path, name in [(site.path, site.tensor or ""), *site.ties]:
            before = _stored(model, changed, path, name)
            changed[path, name] = method.value(tensors(before.dtype), before)
    else:
        if site.kind != "norm":
            _apply_weight(model, site, method, tensors, changed)
        _apply_bias(model, site, method, tensors, changed)


def _apply_weight(model: nn.Module, site: Site, method: OnLinear, tensors: Tensors, changed: Change) -> None:
    stored = _stored(model, changed, site.path, "weight")
    W = site.matrix(stored)
    new = method.weight(tensors(W.dtype), W)
    if new is not W:
        changed[site.path, "weight"] = site.stored(new, stored)


def _apply_bias(model: nn.Module, site: Site, method: OnLinear, tensors: Tensors, changed: Change) -> None:
    module = model.get_submodule(site.path)
    weight = _stored(model, changed, site.path, "weight")
    has = module._parameters.get("bias") is not None or (site.path, "bias") in changed
    bias = _stored(model, changed, site.path, "bias") if has else None
    part = bias if bias is None or site.part is None else site.part.take(bias, 0)
    new = method.bias(tensors(weight.dtype), part)
    if new is None or new is part:
        return
    if bias is None and "bias" not in module._parameters:
        cannot = f"gives {site.path!r} a bias, but {type(module).__name__} cannot hold one"
        raise DeltaTuneError(f"{method} {cannot}. Keep it attached.")
    if site.part is not None:
        whole = bias if bias is not None else weight.new_zeros(weight.shape[1 if site.transposed else 0])
        new = site.part.put(whole, new, 0)
    changed[site.path, "bias"] = new


def _stored(model: nn.Module, changed: Change, path: str, name: str) -> Tensor:
    if (path, name) in changed:
        return changed[path, name]
    parameter: Any = model.get_submodule(path)._parameters[name]
    return parameter.detach().to("cpu", _precise(parameter))


def _precise(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _cast(model: nn.Module, place: tuple[str, str], tensor: Tensor) -> Tensor:
    module = model.get_submodule(place[0])
    own = module._parameters.get(place[1])
    like = own if own is not None else module._parameters["weight"]
    new = tensor.to(like.device, like.dtype).contiguous()  # type: ignore[union-attr]
    if not torch.isfinite(new).all():
        cause = "holds NaN or infinity" if not torch.isfinite(tensor).all() else f"overflows {new.dtype}"
        raise DeltaTuneError(f"the merged {'.'.join(place)} {cause}; nothing was changed.")
    return new


def _check_ties(model: nn.Module, changed: Change, untie: bool) -> None:
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(p) for p in module._parameters.values() if p is not None)
    groups: dict[int, dict[tuple[int, str], str]] = {}
    for path, name in changed:
        module = model.get_submodule(path)
        if module._parameters.get(name) is not None:
            groups.setdefault(id(module._parameters[name]), {})[id(module), name] = path
    for parameter, places in groups.items():
        (first, name), *others = [(path, name) for (_, name), path in places.items()]
        alike = all(torch.equal(changed[first, name], changed[place]) for place in others)
        if untie or (owners[parameter] == len(places) and alike):
            continue
        with_whom = "another module that the delta does not change"
        if not alike:
            with_whom = f"{others[0][0]}.{others[0][1]}, to which the delta gives another value"
        raise DeltaTuneError(f"{first}.{name} is shared with {with_whom}; pass untie=True to give it its own copy.")


@dataclass
class Merged:
    """A backbone with a delta written into it, and the originals for an exact undo (also by leaving its `with` block)."""

    model: nn.Module
    originals: list[tuple[nn.Module, str, nn.Parameter | None]] = field(default_factory=list)

    def undo(self) -> None:
        """Put the very parameters back that were there before."""
        for module, name, parameter in reversed(self.originals):
            module._parameters[name] = parameter
        self.originals.clear()

    def __enter__(self) -> Merged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def merge_(model: nn.Module, what: Weights | Attachment, untie: bool = False, check: bool = True) -> Merged:
    """Detach the delta if it is attached and write it into the backbone; the result undoes the writing exactly."""
    state = merge(model, what, untie, check)
    if isinstance(what, Attachment) and what.attached:
        what.detach()
    merged = Merged(model)
    renewed: dict[int, list[nn.Parameter]] = {}
    for path, tensor in state.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        before = module._parameters.get(name)
        shared = [] if before is None else renewed.setdefault(id(before), [])
        new = next((p for p in shared if torch.equal(p, tensor)), None)  # what was tied and stays equal stays tied
        if new is None:
            new = nn.Parameter(tensor, requires_grad=before is not None and before.requires_grad)
            shared.append(new)
        merged.originals.append((module, name, before))
        module._parameters[name] = new
    return merged
