"""Ports: what a method becomes at one module of a live model. They compute; only `attach` puts them there.

A port has one verb: `pre` changes a call's arguments, `post` its output, `param` one parameter for the time of the call,
and `heads` serves the attention function of the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from deltatune.core.method import OnLinear
from deltatune.core.site import Part, Site
from deltatune.core.stored import ORDINARY, values

if TYPE_CHECKING:
    from deltatune.core.calls import Ports
    from deltatune.core.leaves import Tensors

PORTS = "_deltatune_ports"
Verb = Literal["pre", "post", "param", "heads", "around", "scope"]
Call = tuple[tuple[Any, ...], dict[str, Any]]


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

    def before(self, here: Ports) -> list[LinearPort]:
        """Return the ports that change the same weight before this one does."""
        ports = [p for p in here.post if isinstance(p, LinearPort) and p.site.part == self.site.part]
        return ports[: ports.index(self)]

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        p, base, part = self.tensors(y.dtype), BaseView(here, self), self.site.part
        if part is None:
            return self.method.output(p, x, y, base)
        return part.put(y, self.method.output(p, x, part.take(y, -1), base), -1)


class InputPort(LinearPort):
    """post: nothing, where `Entrance` has changed what went in; else y -> method.output(p, x, y, base), as its `late` self."""

    def __init__(self, site: Site, method: OnLinear, tensors: Tensors) -> None:
        super().__init__(site, method, tensors)
        self.late = Late(self)

    def last(self, here: Ports) -> bool:
        """Whether nothing behind this port needs x as it came."""
        return here.entries[-1][1].port is self

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        return y if self.last(here) else self.late.post(here, args, kwargs, y)


class Entrance(Port):
    """pre: x -> method.input(p, x), where the port that it belongs to is the last one."""

    def __init__(self, port: InputPort) -> None:
        super().__init__(port.site, port.method, port.tensors)
        self.port = port

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if not self.port.last(here):
            return args, kwargs
        x, *others = args or kwargs.values()
        return (self.method.input(self.tensors(x.dtype), x), *others), {}


class Late(LinearPort):
    """An `InputPort` that acts when the layer has run."""

    def __init__(self, port: InputPort) -> None:
        super().__init__(port.site, port.method, port.tensors)
        self.port = port

    def before(self, here: Ports) -> list[LinearPort]:
        return self.port.before(here)


def watched(module: nn.Module) -> bool:
    """Whether somebody else has a hand in what a module computes: hooks, or another forward."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return "forward" in module.__dict__ or any(hooks)


class BaseView:
    """The layer under a method, with what the ports before it make of its weight and bias; computed when it is read."""

    def __init__(self, here: Ports, port: LinearPort) -> None:
        self.here, self.port = here, port

    @property
    def weight(self) -> Tensor:
        W = self.port.site.matrix(values(self.here.module.weight, self.here.module))  # type: ignore[arg-type]
        for port in self.port.before(self.here):
            W = port.method.weight(port.tensors(W.dtype), W)
        return W

    @property
    def plain(self) -> Tensor | None:
        module, here = self.here.module, self.here
        alone = here.post[0] is self.port and not (here.param or here.around or watched(module))
        kind: Any = type(module)._deltatune_base  # type: ignore[attr-defined]
        if not alone or kind is not nn.Linear or self.port.site.part is not None:
            return None
        W: Any = module.weight
        frozen = not any(p is not None and p.requires_grad for p in module._parameters.values())
        return W if frozen and type(W) in ORDINARY and not torch.is_autocast_enabled(W.device.type) else None

    @property
    def bias(self) -> Tensor | None:
        b = bias_of(self.here.module, self.port.site.part)
        for port in self.port.before(self.here):
            b = port.method.bias(port.tensors(self.weight.dtype), b)
        return b


class StreamPort(Port):
    """pre or post: h -> method.stream(p, h), for the hidden state that goes in or comes out (the first of several)."""

    def __init__(self, site: Site, method: Any, tensors: Tensors, first: str) -> None:
        super().__init__(site, method, tensors)
        self.first = first

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if args:
            return (self._changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, self.first: self._changed(kwargs[self.first])}

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
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

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
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

    def param(self, owner: nn.Module, theta: Tensor) -> Tensor:
        return self.method.value(self.tensors(theta.dtype), theta).to(theta.dtype)


class WeightPort(Port):
    """param: W -> method.weight(p, W), for a module that is no call of a linear layer but computes with such a weight."""

    def param(self, owner: nn.Module, theta: Tensor) -> Tensor:
        before = self.site.matrix(theta)
        W = self.method.weight(self.tensors(theta.dtype), before)
        return theta if W is before else self.site.stored(W.to(theta.dtype), theta)


class BiasPort(Port):
    """param: b -> method.bias(p, b); post, where the module has no place for a bias: y -> y + method.bias(p, None)."""

    def param(self, owner: nn.Module, theta: Tensor | None) -> Tensor | None:
        dtype: torch.dtype = owner.weight.dtype  # type: ignore[assignment]
        b = self.method.bias(self.tensors(dtype), theta)
        return None if b is None else b.to(dtype)

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        b = self.method.bias(self.tensors(y.dtype), None)
        return y if b is None else y + b.to(y.dtype)


@dataclass(frozen=True)
class Edit:
    """One port to be put at one module, under one verb; for `param`, `name` is the parameter, of the module or inside it."""

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
