"""Calls through ports: the dynamic subclass that overrides `__call__`, and what it walks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from deltatune.core.ports import PORTS, Edit
from deltatune.errors import DeltaTuneError

BASE = "_deltatune_base"


@dataclass
class Ports:
    """The ports of one module, in the order they were attached."""

    module: nn.Module
    entries: list[tuple[str, Edit]] = field(default_factory=list)
    pre: tuple[Any, ...] = ()
    post: tuple[Any, ...] = ()
    heads: tuple[Any, ...] = ()
    around: tuple[Any, ...] = ()
    scope: tuple[Any, ...] = ()
    param: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def change(self, entries: list[tuple[str, Edit]]) -> None:
        """Replace the entries and sort their ports by verb, so that a call only walks tuples."""
        self.entries = entries
        by_verb: dict[str, list[Any]] = {"pre": [], "post": [], "heads": [], "around": [], "scope": []}
        by_name: dict[str, list[Any]] = {}
        for _, edit in entries:
            ports = by_name.setdefault(edit.name, []) if edit.verb == "param" else by_verb[edit.verb]
            ports.append(edit.port)
        self.pre, self.post, self.heads = tuple(by_verb["pre"]), tuple(by_verb["post"]), tuple(by_verb["heads"])
        self.around, self.scope = tuple(by_verb["around"]), tuple(by_verb["scope"])
        if len(self.around) > 1:
            both = " and ".join(str(port.method) for port in self.around)
            raise DeltaTuneError(
                f"a {type(self.module).__name__} cannot be {both} at once; set no memory budget where rows are routed or states kept."
            )
        self.param = tuple((name, tuple(ports)) for name, ports in by_name.items())


def run(here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module through its ports, or through those that one part of a batch has there."""
    for port in here.pre:
        args, kwargs = port.pre(here, args, kwargs)
    if here.param:
        return _run_substituted(here, args, kwargs)
    return _run_within(here, args, kwargs)


def _run_within(here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if here.around:
        (port,) = here.around  # one route at a time has the rows of a batch
        y = port.around(here, args, kwargs)
    else:
        y = type(here.module)._deltatune_base.__call__(here.module, *args, **kwargs)  # type: ignore[attr-defined]
    for port in here.post:
        y = port.post(here, args, kwargs, y)
    return y


def _run_substituted(here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    owners = [(_owner(here.module, name), name.rpartition(".")[2], changes) for name, changes in here.param]
    kept = [(owner, name, owner._parameters[name]) for owner, name, _ in owners]
    try:
        for owner, name, changes in owners:
            for port in changes:
                owner._parameters[name] = port.param(owner, owner._parameters[name])
        return _run_within(here, args, kwargs)
    finally:
        for owner, name, theta in kept:
            owner._parameters[name] = theta


@contextmanager
def standing(inside: Iterable[tuple[nn.Module, Ports]]) -> Iterator[None]:
    """The scope in which modules inside the one that is running have these ports."""
    kept = [(module, module.__dict__[PORTS]) for module, _ in inside]
    try:
        for module, ports in inside:
            module.__dict__[PORTS] = ports
        yield
    finally:
        for module, ports in kept:
            module.__dict__[PORTS] = ports


def _owner(module: nn.Module, name: str) -> nn.Module:
    """Return the module that holds a parameter named as seen from `module`, itself in most cases."""
    path = name.rpartition(".")[0]
    return module.get_submodule(path) if path else module


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return run(self.__dict__[PORTS], args, kwargs)


def _generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with ExitStack() as scopes:
        for port in self.__dict__[PORTS].scope:
            scopes.enter_context(port.scope(args, kwargs))
        return type(self)._deltatune_base.generate(self, *args, **kwargs)  # type: ignore[attr-defined]


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
def without_ports(kind: type) -> type:
    """Return the class that a module had before it got ports, also where someone else has put a subclass on top since."""
    if BASE in vars(kind):
        return vars(kind)[BASE]
    bases = tuple(map(without_ports, kind.__bases__))
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return kind if bases == kind.__bases__ else type(kind)(kind.__name__, bases, own)


@cache
def with_ports(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `base` whose calls go through the ports; it keeps the name, by which others look classes up."""
    verbs = {"__call__": _call, "__reduce_ex__": _reduce, "extra_repr": _extra_repr}
    if "generate" in dir(base):
        verbs["generate"] = _generate
    return type(base.__name__, (base,), {**verbs, "__module__": base.__module__, BASE: base})
