"""Ports: what a method becomes at one module of a live model. They compute; only `attach` puts them there.

A port has one verb: `pre` changes a call's arguments, `post` its output, `param` one parameter for the time of the call,
and `heads` serves the attention function of the backbone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.core.delta import Placement
from deltatune.core.method import Bag, Method, OnLinear
from deltatune.core.site import Anatomy, Part, Site
from deltatune.errors import DeltaTuneError

PORTS = "_deltatune_ports"
Verb = Literal["pre", "post", "param", "heads"]


class Tensors:
    """A method's tensors at one site, read from the module that holds the delta's leaves at the time of use."""

    def __init__(self, method: Method, holder: nn.Module, keys: dict[str, str]) -> None:
        self.method, self.holder, self.keys = method, holder, keys

    def __call__(self, dtype: torch.dtype) -> Any:
        """Return the leaves as attributes, cast once to the compute dtype; indices stay whole numbers."""
        held = self.live().items()
        return self.method.unfold(Bag({leaf: t.to(dtype) if t.is_floating_point() else t for leaf, t in held}))

    def live(self) -> dict[str, Tensor]:
        """Return the leaves themselves, by name."""
        trained, fixed = self.holder._parameters, self.holder._buffers
        return {leaf: trained[key] if key in trained else fixed[key] for leaf, key in self.keys.items()}  # type: ignore[misc]


def weight_of(module: nn.Module, transposed: bool, part: Part | None) -> Tensor:
    """Return a linear module's weight as [d_out, d_in], of one part when several roles share it."""
    weight: Tensor = module.weight.mT if transposed else module.weight  # type: ignore[assignment,union-attr]
    return weight if part is None else part.take(weight, 0)


def bias_of(module: nn.Module, part: Part | None) -> Tensor | None:
    """Return a module's bias [d_out], of one part when several roles share it, or None."""
    bias = module._parameters.get("bias")
    return bias if bias is None or part is None else part.take(bias, 0)


class Port:
    """One method's tensors at one module."""

    def __init__(self, site: Site, method: Any, tensors: Tensors) -> None:
        self.site, self.method, self.tensors = site, method, tensors


class LinearPort(Port):
    """post: y -> method.output(p, x, y, base)."""

    def __init__(self, site: Site, method: OnLinear, tensors: Tensors) -> None:
        super().__init__(site, method, tensors)

    def post(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        p, base, part = self.tensors(y.dtype), BaseView(module, self), self.site.part
        if part is None:
            return self.method.output(p, x, y, base)
        return part.put(y, self.method.output(p, x, part.take(y, -1), base), -1)


class BaseView:
    """The layer under a method, with what the ports before it make of its weight and bias; computed when it is read."""

    def __init__(self, module: nn.Module, port: LinearPort) -> None:
        self.module, self.port = module, port

    def _before(self) -> list[LinearPort]:
        ports = [
            p
            for p in self.module.__dict__[PORTS].post
            if isinstance(p, LinearPort) and p.site.part == self.port.site.part
        ]
        return ports[: ports.index(self.port)]

    @property
    def weight(self) -> Tensor:
        W = weight_of(self.module, self.port.site.transposed, self.port.site.part)
        for port in self._before():
            W = port.method.weight(port.tensors(W.dtype), W)
        return W

    @property
    def bias(self) -> Tensor | None:
        b = bias_of(self.module, self.port.site.part)
        for port in self._before():
            b = port.method.bias(port.tensors(self.weight.dtype), b)
        return b


class StreamPort(Port):
    """pre or post: h -> method.stream(p, h), for the hidden state that goes in or comes out (the first of several)."""

    def __init__(self, site: Site, method: Any, tensors: Tensors, first: str) -> None:
        super().__init__(site, method, tensors)
        self.first = first

    def pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, self.first: self._changed(kwargs[self.first])}

    def post(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        return (self._placed(y[0]), *y[1:]) if isinstance(y, tuple) else self._placed(y)

    def _placed(self, y: Tensor) -> Tensor:
        """Change an output, or this site's part of it when several roles share the module."""
        part = self.site.part
        return self._changed(y) if part is None else part.put(y, self._changed(part.take(y, -1)), -1)

    def _changed(self, h: Tensor) -> Tensor:
        return self.method.stream(self.tensors(h.dtype), h)


class BranchPort(StreamPort):
    """pre keeps what goes into a sub-layer; post: y -> method.output(p, x, y), the first of several outputs."""

    def __init__(self, site: Site, method: Any, tensors: Tensors, first: str) -> None:
        super().__init__(site, method, tensors, first)
        self.x: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "x": None}  # it belongs to a graph, and the next call brings another

    def pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.x = args[0] if args else kwargs[self.first]
        return args, kwargs

    def _changed(self, h: Tensor) -> Tensor:
        x, self.x = self.x, None
        return self.method.output(self.tensors(h.dtype), x, h)


class Ladder:
    """The side state of one delta beside one stack, on its way up."""

    def __init__(self) -> None:
        self.s: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"s": None}


class LadderPort(StreamPort):
    """post on a block: s -> method.rung(p, h, s); on the last one also h -> method.top(p, h, s)."""

    def __init__(
        self, site: Site, method: Any, tensors: Tensors, first: str, ladder: Ladder, is_first: bool, is_last: bool
    ) -> None:
        super().__init__(site, method, tensors, first)
        self.ladder, self.is_first, self.is_last = ladder, is_first, is_last

    def _changed(self, h: Tensor) -> Tensor:
        p, before = self.tensors(h.dtype), None if self.is_first else self.ladder.s
        s = self.method.rung(p, h, before)
        self.ladder.s = None if self.is_last else s
        return self.method.top(p, h, s) if self.is_last else h


class TensorPort(Port):
    """param: theta -> method.value(p, theta)."""

    def param(self, theta: Tensor) -> Tensor:
        return self.method.value(self.tensors(theta.dtype), theta).to(theta.dtype)


@dataclass(frozen=True)
class Edit:
    """One port to be put at one module, under one verb; for `param`, `name` is the parameter."""

    module: nn.Module
    verb: Verb
    port: Any
    name: str = ""


@dataclass(frozen=True)
class Setting:
    """One attribute of one object to be changed while the port is there (a backbone's choice of attention function)."""

    owner: Any
    attribute: str
    value: Any


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
    module = model.get_submodule(placement.site.path)
    return [Edit(module, "post", LinearPort(placement.site, placement.method, tensors))], []  # type: ignore[arg-type]


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
            module = model.get_submodule(placement.site.path)
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
    module = model.get_submodule(site.path)
    return module, module if site.exit is None else model.get_submodule(site.exit)


def _tensor(model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors) -> Built:
    site = placement.site
    port = TensorPort(site, placement.method, tensors)
    where = [(site.path, site.tensor or ""), *site.ties]
    return [Edit(model.get_submodule(path), "param", port, name) for path, name in where], []


BUILDERS.update(linear=each(_linear), stream=each(_stream), branch=each(_branch), ladder=_ladder, tensor=each(_tensor))
