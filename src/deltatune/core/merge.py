"""Merging: a delta written into the backbone's own tensors. Computed in float32, cast once; the way back is to keep the originals.

A quantised parameter is dequantised, changed and quantised again, which loses some of a change that is smaller than its
steps. What is lost anywhere is measured: |written - exact| / |change|.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.core.attach import Attachment
from deltatune.core.delta import Placement, place
from deltatune.core.fit import check_backbone, check_tensors
from deltatune.core.leaves import Leaves, Tensors, key, tensors_of
from deltatune.core.method import OnLinear
from deltatune.core.report import TOLERANCE, Report, refuse
from deltatune.core.site import Site
from deltatune.core.stored import quantised, sharded, stored, values
from deltatune.core.weights import Weights, completed, fingerprint
from deltatune.errors import DeltaTuneError

Change = dict[tuple[str, str], Tensor]


def merge(
    model: nn.Module, what: Weights | Attachment, untie: bool = False, check: bool = True, tolerance: float = TOLERANCE
) -> dict[str, Tensor]:
    """Return `{parameter path: new tensor}` for every parameter that the delta changes; the model is not touched.

    `untie=True` allows a new tensor for one of several places that share a parameter, and `check=False` a backbone of
    the same structure with other values. `tolerance` is the share of its change that a quantised parameter may lose.
    Raises `DeltaTuneError` for weights of another backbone, for a method that no weight can express, when a value
    overflows the backbone's dtype, and above the tolerance.
    """
    return _merged(model, what, untie, check, tolerance)[0]


def _merged(
    model: nn.Module, what: Weights | Attachment, untie: bool, check: bool, tolerance: float
) -> tuple[dict[str, Tensor], Report]:
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
    written = {
        ".".join(filter(None, place)): _written(model, place, tensor)
        for place, tensor in changed.items()
        if not _stays(model, place, tensor)
    }
    report = Report({path: lost for path, (_, lost, _) in written.items()}, tolerance)
    rounded = Report({path: lost for path, (_, lost, lossy) in written.items() if lossy}, tolerance)
    refuse(
        rounded,
        "the backbone is quantised, and rounds what is written into it. Keep the delta attached, merge it into the "
        "backbone before quantising (check=False), or allow more.",
    )
    return {path: tensor for path, (tensor, _, _) in written.items()}, report


def _holder(model: nn.Module, weights: Weights, placements: list[Placement]) -> Leaves:
    return Leaves({}, {key(name): tensor for name, tensor in completed(model, weights, placements).items()})


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
    module = model.get_submodule(path)
    parameter: Any = module._parameters[name]
    return precisely(parameter, module)


def precisely(parameter: Tensor, module: nn.Module) -> Tensor:
    """Return the values of a module's parameter on the CPU, in float32 or finer."""
    theta = values(parameter, module).detach()
    return theta.to("cpu", torch.promote_types(theta.dtype, torch.float32))


def _stays(model: nn.Module, place: tuple[str, str], exact: Tensor) -> bool:
    """Whether a quantised parameter keeps its value: rounding it once more could still move it."""
    module = model.get_submodule(place[0])
    own = module._parameters.get(place[1])
    return own is not None and quantised(own) and torch.equal(exact, precisely(own, module))


def _written(model: nn.Module, place: tuple[str, str], exact: Tensor) -> tuple[Tensor, float, bool]:
    """Return the new tensor of a parameter, which share of its change the rounding loses, and whether it is quantised."""
    module = model.get_submodule(place[0])
    own = module._parameters.get(place[1])
    if own is None:
        new, before, lossy = _beside(module._parameters["weight"], module, exact), torch.zeros(()), False
    else:
        new, before, lossy = stored(exact, own), precisely(own, module), quantised(own)
    held = values(new, module)
    if not torch.isfinite(held).all():
        cause = "holds NaN or infinity" if not torch.isfinite(exact).all() else f"overflows {held.dtype}"
        raise DeltaTuneError(f"the merged {'.'.join(place)} {cause}; nothing was changed.")
    change = float((exact - before).norm())
    return new, float((held.to(exact) - exact).norm()) / change if change else 0.0, lossy


def _beside(weight: Any, module: nn.Module, exact: Tensor) -> Tensor:
    """Return a new bias in the float type and at the place of the weight beside it."""
    like = values(weight, module)
    return exact.to(like.device, like.dtype).contiguous()


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
    """A backbone with a delta written into it, the originals for an exact undo (also by leaving its `with` block), and what was lost."""

    model: nn.Module
    report: Report
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


def _check_whole(state: dict[str, Tensor]) -> None:
    """Raise `DeltaTuneError` where sharding would go on with the old parameter, which it keeps to itself."""
    for path, new in state.items():
        if sharded(new):
            raise DeltaTuneError(
                f"{path} is sharded, and the sharding would keep its old values. Merge before sharding, or write what "
                "merge(model, weights) returns into a checkpoint."
            )


def merge_(
    model: nn.Module, what: Weights | Attachment, untie: bool = False, check: bool = True, tolerance: float = TOLERANCE
) -> Merged:
    """Detach the delta if it is attached and write it into the backbone, as `merge` does; the result undoes the writing exactly."""
    state, report = _merged(model, what, untie, check, tolerance)
    _check_whole(state)
    if isinstance(what, Attachment) and what.attached:
        what.detach()
    merged = Merged(model, report)
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
