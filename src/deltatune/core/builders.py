"""Builders: which ports a term of a delta puts at which modules; only `attach` puts them there."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from deltatune.core.delta import Placement
from deltatune.core.leaves import Tensors
from deltatune.core.method import OnLinear
from deltatune.core.ports import (
    BiasPort,
    BranchPort,
    Edit,
    Entrance,
    InputPort,
    Ladder,
    LadderPort,
    LinearPort,
    Setting,
    StreamPort,
    TensorPort,
    WeightPort,
)
from deltatune.core.site import Anatomy, Site, read_by
from deltatune.core.walk import submodule
from deltatune.errors import DeltaTuneError

Seat = tuple[Placement, Tensors]
Built = tuple[list[Edit], list[Setting]]
Builder = Callable[[nn.Module, Anatomy, list[Seat]], Built]
BUILDERS: dict[str, Builder] = {}  # by `Method.acts`; backbones add those that need their attention


def each(build: Callable[[nn.Module, Anatomy, Placement, Tensors], Built]) -> Builder:
    """Return the builder of a term whose sites know nothing of one another."""

    def builder(model: nn.Module, anatomy: Anatomy, seats: list[Seat]) -> Built:
        built = [build(model, anatomy, placement, tensors) for placement, tensors in seats]
        return [edit for edits, _ in built for edit in edits], [
            setting for _, settings in built for setting in settings
        ]

    return builder


def first_argument(module: nn.Module) -> str:
    """Return the name of the first argument of a module's forward."""
    names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
    if not names:
        raise DeltaTuneError(
            f"{type(module).__name__}.forward takes no argument, so there is no hidden state to act on."
        )
    return names[0]


def _linear(model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors) -> Built:
    site, method = placement.site, placement.method
    module = submodule(model, site.path)
    if site.kind not in ("embedding", "conv") and read_by(model, site.path) is None:
        return _called(module, site, method, tensors), []  # type: ignore[arg-type]
    weight, bias = WeightPort(site, method, tensors), BiasPort(site, method, tensors)
    held = "bias" in module._parameters
    return [
        _param(model, site.path, "weight", weight),
        _param(model, site.path, "bias", bias) if held else Edit(module, "post", bias),
    ], []


def _called(module: nn.Module, site: Site, method: OnLinear, tensors: Tensors) -> list[Edit]:
    """Return the edits of a layer that is called: before it, where the method does no more than change what goes in."""
    if site.part is None and method.enters(site):
        port = InputPort(site, method, tensors)
        return [Edit(module, "pre", Entrance(port)), Edit(module, "post", port)]
    return [Edit(module, "post", LinearPort(site, method, tensors))]


def _stream(model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors) -> Built:
    site = placement.site
    enter, leave = _ends(model, site)
    port = StreamPort(site, placement.method, tensors, first_argument(enter))
    return [Edit(enter, "pre", port) if site.side == "in" else Edit(leave, "post", port)], []


def _branch(model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors) -> Built:
    enter, leave = _ends(model, placement.site)
    port = BranchPort(placement.site, placement.method, tensors, first_argument(enter))
    return [Edit(enter, "pre", port), Edit(leave, "post", port)], []


def _ladder(model: nn.Module, anatomy: Anatomy, seats: list[Seat]) -> Built:
    edits = []
    for stack in dict.fromkeys(placement.site.stack for placement, _ in seats):
        own = sorted((s for s in seats if s[0].site.stack == stack), key=lambda seat: seat[0].site.layer or 0)
        ladder = Ladder()
        for rung, (placement, tensors) in enumerate(own):
            module = submodule(model, placement.site.path)
            ends = rung == 0, rung == len(own) - 1
            port = LadderPort(placement.site, placement.method, tensors, first_argument(module), ladder, *ends)
            edits.append(Edit(module, "post", port))
        top = own[-1][0].site
        if stack in {s.name for s in anatomy.stacks} and top.layer != anatomy.stack(stack).layers - 1:
            raise DeltaTuneError(
                f"{seats[0][0].method} ends at {top.path!r}, but a ladder hands its result on behind the last block; "
                f"include block[-1] in its where."
            )
    return edits, []


def _ends(model: nn.Module, site: Site) -> tuple[nn.Module, nn.Module]:
    """Return the modules at which a site begins and ends."""
    module = submodule(model, site.path)
    return module, module if site.exit is None else submodule(model, site.exit)


def _param(model: nn.Module, path: str, name: str, port: TensorPort | WeightPort | BiasPort) -> Edit:
    """Return the edit of one parameter: at its module, or at the module that reads it without calling its own."""
    over = read_by(model, path)
    if over is None:
        return Edit(submodule(model, path), "param", port, name)
    return Edit(submodule(model, over), "param", port, f"{path.rpartition('.')[2]}.{name}")


def _tensor(model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors) -> Built:
    site = placement.site
    port = TensorPort(site, placement.method, tensors)
    where = [(site.path, site.tensor or ""), *site.ties]
    return [_param(model, path, name, port) for path, name in where], []


BUILDERS.update(linear=each(_linear), stream=each(_stream), branch=each(_branch), ladder=_ladder, tensor=each(_tensor))
