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
        """Return the leaves as attributes, cast once to the compute dtype."""
        trained, fixed = self.holder._parameters, self.holder._buffers
        held = {leaf: trained[key] if key in trained else fixed[key] for leaf, key in self.keys.items()}
        return self.method.unfold(Bag({leaf: tensor.to(dtype) for leaf, tensor in held.items()}))  # type: ignore[union-attr]


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
        return (self._changed(y[0]), *y[1:]) if isinstance(y, tuple) else self._changed(y)

    def _changed(self, h: Tensor) -> Tensor:
        return self.method.stream(self.tensors(h.dtype), h)


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


Builder = Callable[[nn.Module, Anatomy, Placement, Tensors], tuple[list[Edit], list[Setting]]]
BUILDERS: dict[str, Builder] = {}  # by `Method.acts`; backbones add those that need their attention


def first_argument(module: nn.Module) -> str:
    """Return the name of the first argument of a module's forward."""
    names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
    if not names:
        raise DeltaTuneError(
            f"{type(module).__name__}.forward takes no argument, so there is no hidden state to act on."
        )
    return names[0]


def _linear(
    model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors
) -> tuple[list[Edit], list[Setting]]:
    module = model.get_submodule(placement.site.path)
    return [Edit(module, "post", LinearPort(placement.site, placement.method, tensors))], []  # type: ignore[arg-type]


def _stream(
    model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors
) -> tuple[list[Edit], list[Setting]]:
    module = model.get_submodule(placement.site.path)
    port = StreamPort(placement.site, placement.method, tensors, first_argument(module))
    return [Edit(module, "pre" if placement.site.side == "in" else "post", port)], []


def _tensor(
    model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors
) -> tuple[list[Edit], list[Setting]]:
    site = placement.site
    port = TensorPort(site, placement.method, tensors)
    where = [(site.path, site.tensor or ""), *site.ties]
    return [Edit(model.get_submodule(path), "param", port, name) for path, name in where], []


BUILDERS.update(linear=_linear, stream=_stream, tensor=_tensor)
