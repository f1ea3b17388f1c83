"""Calls through ports: the dynamic subclass that overrides `__call__`, and what it walks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from deltatune.core.ports import PORTS, Edit

BASE = "_deltatune_base"


@dataclass
class Ports:
    """The ports of one module, in the order they were attached."""

    entries: list[tuple[str, Edit]] = field(default_factory=list)
    pre: tuple[Any, ...] = ()
    post: tuple[Any, ...] = ()
    heads: tuple[Any, ...] = ()
    param: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def change(self, entries: list[tuple[str, Edit]]) -> None:
        """Replace the entries and sort their ports by verb, so that a call only walks tuples."""
        self.entries = entries
        by_verb = {verb: tuple(e.port for _, e in entries if e.verb == verb) for verb in ("pre", "post", "heads")}
        self.pre, self.post, self.heads = by_verb["pre"], by_verb["post"], by_verb["heads"]
        names = dict.fromkeys(e.name for _, e in entries if e.verb == "param")
        self.param = tuple((n, tuple(e.port for _, e in entries if e.verb == "param" and e.name == n)) for n in names)


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    ports: Ports = self.__dict__[PORTS]
    for port in ports.pre:
        args, kwargs = port.pre(self, args, kwargs)
    if ports.param:
        return _call_substituted(self, ports, args, kwargs)
    y = type(self)._deltatune_base.__call__(self, *args, **kwargs)  # type: ignore[attr-defined]
    for port in ports.post:
        y = port.post(self, args, kwargs, y)
    return y


def _call_substituted(self: nn.Module, ports: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    owners = [(_owner(self, name), name.rpartition(".")[2], changes) for name, changes in ports.param]
    kept = [(owner, name, owner._parameters[name]) for owner, name, _ in owners]
    try:
        for owner, name, changes in owners:
            for port in changes:
                owner._parameters[name] = port.param(owner, owner._parameters[name])
        y = type(self)._deltatune_base.__call__(self, *args, **kwargs)  # type: ignore[attr-defined]
        for port in ports.post:
            y = port.post(self, args, kwargs, y)
        return y
    finally:
        for owner, name, theta in kept:
            owner._parameters[name] = theta


def _owner(module: nn.Module, name: str) -> nn.Module:
    """Return the module that holds a parameter named as seen from `module`, itself in most cases."""
    path = name.rpartition(".")[0]
    return module.get_submodule(path) if path else module


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    _, _, *rest = object.__reduce_ex__(self, protocol)
    return (_rebuild, (type(self)._deltatune_base,), *rest)  # type: ignore[attr-defined]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    ported = with_ports(base)
    return ported.__new__(ported)


def _extra_repr(self: nn.Module) -> str:
    own = type(self)._deltatune_base.extra_repr(self)  # type: ignore[attr-defined]
    shown = dict.fromkeys(f"{name}: {edit.port.method}" for name, edit in self.__dict__[PORTS].entries)
    return ", ".join(filter(None, [own, *(f"<{text}>" for text in shown)]))


@cache
def with_ports(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `base` whose calls go through the ports; it keeps the name, by which others look classes up."""
    verbs = {"__call__": _call, "__reduce_ex__": _reduce, "extra_repr": _extra_repr}
    return type(base.__name__, (base,), {**verbs, "__module__": base.__module__, BASE: base})
