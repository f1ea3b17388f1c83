"""Attaching: the only file that touches a live model, and what it does is undone bit for bit.

A module gets ports by a dynamic subclass of its class (`core.calls`); without ports it gets its class back. The leaves
hang under one reserved child of the root, `model.deltas.<name>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from keyword import iskeyword
from operator import attrgetter
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from deltatune.core.builders import BUILDERS, Seat
from deltatune.core.calls import Ports, with_ports, without_ports
from deltatune.core.delta import Delta, Placement, as_delta, place
from deltatune.core.fit import check_backbone, check_tensors
from deltatune.core.leaves import Leaves, hold, key, tensors_of
from deltatune.core.method import Method
from deltatune.core.ports import PORTS, Edit, Setting
from deltatune.core.site import Anatomy, anatomy
from deltatune.core.stored import settings as needs
from deltatune.core.stored import settle, stored, values
from deltatune.core.walk import modules, parameters
from deltatune.core.weights import Weights, completed, fingerprint, start
from deltatune.errors import DeltaTuneError


class Deltas(nn.Module):
    """The reserved child of the root that holds the leaves of every attachment, and what attaching has to give back."""

    def __init__(self, frozen: dict[str, bool]) -> None:
        super().__init__()
        self.attached: dict[str, Link] = {}
        self.frozen = frozen
        self.settings: list[tuple[Setting, Any]] = []

    def forward(self, x: Any) -> Any:
        """Hand on what comes: a root that calls all its children in a row (`nn.Sequential`) comes past here."""
        return x


class Link:
    """Something live on a backbone, under a name: its leaves hang at `model.deltas.<name>`, and detaching undoes it bit for bit."""

    def __init__(self, model: nn.Module, name: str, leaves: nn.Module, what: object) -> None:
        self.model, self.name, self.leaves, self.what = model, name, leaves, what

    @property
    def attached(self) -> bool:
        """Whether the link still exists."""
        return links(self.model).get(self.name) is self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trained tensors."""
        return self.leaves.parameters()

    def detach(self) -> None:
        """Take this off the model; raises `DeltaTuneError` when it is off already."""
        if not self.attached:
            raise DeltaTuneError(f"{self.name!r} is not attached any more.")
        _remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.attached:
            self.detach()

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        return f"<{'attached' if self.attached else 'detached'} {self.name}: {self.what}, {count:,} parameters>"


class Attachment(Link):
    """A live link between weights and a backbone; undone by `detach()` or by leaving its `with` block."""

    leaves: Leaves

    def __init__(
        self, model: nn.Module, name: str, source: Weights, placements: list[Placement], leaves: Leaves
    ) -> None:
        super().__init__(model, name, leaves, source.delta)
        self.delta, self.placements = source.delta, placements
        self._describe(source)

    def _describe(self, source: Weights) -> None:
        """Keep all of `source` but its numbers, which the leaves hold: a second copy would double the memory of Full."""
        self._spec, self._fixed = replace(source, tensors={}, fixed={}), frozenset(source.fixed)

    @property
    def weights(self) -> Weights:
        """The current numbers, as float32 CPU copies; of sharded leaves all of them, so every process has to ask."""
        trained = {p.name(leaf) for p in self.placements for leaf, d in p.leaves.items() if d.trained}
        held = dict(self.named_tensors())
        now, fixed = (
            {n: values(t, self.leaves).detach().to("cpu", copy=True) for n, t in held.items() if n in names}
            for names in (trained, self._fixed)
        )
        return replace(self._spec, tensors=now, fixed=fixed)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained tensors with their names in the weights."""
        return ((name, t) for name, t in self.named_tensors() if isinstance(t, nn.Parameter))

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors, trained or not, with their names in the weights."""
        held: dict[str, Any] = {**self.leaves._parameters, **self.leaves._buffers}
        names = dict.fromkeys(p.name(leaf) for p in self.placements for leaf in p.leaves)
        return ((name, held[key(name)]) for name in names)

    def set(self, weights: Weights) -> None:
        """Put other numbers of the same delta in place, without touching the model's structure or a compiled graph."""
        if weights.delta != self.delta:
            raise DeltaTuneError(f"{self.name!r} holds {self.delta}; the weights given are for {weights.delta}.")
        check_tensors(weights, self.placements)
        held = completed(self.model, weights, self.placements)
        settle(self.model)
        for name, tensor in self.named_tensors():
            tensor.data.copy_(stored(held[name], tensor))
        self._describe(weights)

    def freeze(self) -> None:
        """Stop training these tensors: they stay in the model's function, and what is attached next is trained on top of them."""
        self.leaves.requires_grad_(False)


def attach(
    model: nn.Module, what: Weights | Delta | Method, name: str | None = None, seed: int = 0, check: bool = True
) -> Attachment:
    """Attach weights, or a delta with fresh weights, to `model` and freeze the backbone.

    `check=False` accepts a backbone of the same structure with other values. Raises `DeltaTuneError`, leaving the model
    as it was, when the name is taken, the backbone is another one, or the tensors do not fit.
    """
    name, parts = free_name(model, name), anatomy(model)
    if isinstance(what, Weights):
        weights, placements = what, place(model, what.delta, parts)
        check_backbone(weights.backbone, fingerprint(model), check)
        check_tensors(weights, placements)
    else:
        placements = place(model, as_delta(what), parts)
        weights = start(as_delta(what), model, placements, seed)
    return enliven(model, name, weights, placements, hold(model, weights, placements), parts)


def enliven(
    model: nn.Module, name: str, weights: Weights, placements: list[Placement], leaves: Leaves, parts: Anatomy
) -> Attachment:
    """Put `leaves` that hold the tensors of `weights` to work, under a name that is free."""
    edits, settings = plan(model, placements, leaves, parts)
    attachment = Attachment(model, name, weights, placements, leaves)
    hang(attachment, settings)
    put(attachment, edits)
    return attachment


def free_name(model: nn.Module, name: str | None, prefix: str = "delta") -> str:
    """Return the name under which something new can hang on the model, `name` itself where one is given and can."""
    deltas = model._modules.get("deltas")
    if "deltas" in dir(model) and not isinstance(deltas, Deltas):
        raise DeltaTuneError(
            "the model has a child called 'deltas' of its own, the name that deltatune reserves on the root."
        )
    taken = deltas.attached if isinstance(deltas, Deltas) else {}
    if name is None:
        return next(f"{prefix}{i}" for i in range(len(taken) + 1) if f"{prefix}{i}" not in taken)
    if name in taken:
        raise DeltaTuneError(
            f"a delta called {name!r} is attached already ({taken[name].what}); detach it or choose another name."
        )
    if not name.isidentifier() or iskeyword(name) or name in dir(Deltas({})):
        raise DeltaTuneError(f"{name!r} cannot be read as model.deltas.<name>; choose a plain name such as 'sst2'.")
    return name


def plan(
    model: nn.Module, placements: list[Placement], leaves: Leaves, parts: Anatomy | None = None
) -> tuple[list[Edit], list[Setting]]:
    """Return the ports that a delta puts at the model's modules, and the settings that they need; touches nothing."""
    terms: dict[int, list[Seat]] = {}
    for placement in placements:
        acting = placement.method.computes
        inner = placement if acting is placement.method else replace(placement, method=acting)
        terms.setdefault(placement.term, []).append((inner, tensors_of(placement, leaves)))
    edits: list[Edit] = []
    settings = [Setting(*needed) for needed in needs(model)]
    parts = parts or anatomy(model)
    for seats in terms.values():
        method = seats[0][0].method
        if method.acts not in BUILDERS:
            raise DeltaTuneError(
                f"{method} needs the attention of a transformers model; import deltatune.backbones first."
            )
        more, also = BUILDERS[method.acts](model, parts, seats)
        edits += more
        settings += also
    return edits, settings


def hang(link: Link, settings: Iterable[Setting]) -> None:
    """Hang a link's leaves under the model, which freezes the backbone, and change what its ports need changed."""
    model = link.model
    if "deltas" not in model._modules:
        own = dict(parameters(model))
        model.add_module("deltas", Deltas({name: p.requires_grad for name, p in own.items()}))
        for parameter in own.values():
            parameter.requires_grad_(False)
    deltas: Any = model._modules["deltas"]
    deltas.add_module(link.name, link.leaves)
    deltas.attached[link.name] = link
    change_settings(link, settings)


def change_settings(link: Link, settings: Iterable[Setting]) -> None:
    """Change what ports need changed around them; it is given back when the last link goes."""
    deltas: Any = link.model._modules["deltas"]
    for setting in settings:
        before = attrgetter(setting.attribute)(setting.owner)
        if before != setting.value:
            deltas.settings.append((setting, before))
            setattr(setting.owner, setting.attribute, setting.value)


def put(link: Link, edits: Iterable[Edit]) -> None:
    """Put a link's ports at the modules of its model."""
    for module, own in groupby(sorted(edits, key=lambda e: id(e.module)), key=lambda e: e.module):
        if PORTS not in module.__dict__:
            module.__dict__[PORTS] = Ports(module)
            module.__class__ = with_ports(type(module))
        ports: Ports = module.__dict__[PORTS]
        new = dict.fromkeys((link.name, edit) for edit in own)  # sites may ask for the same thing around them
        ports.change([*ports.entries, *(entry for entry in new if entry not in ports.entries)])


def take_off(link: Link, modules: Iterable[nn.Module]) -> None:
    """Take a link's ports off these modules; one that has none left gets its class back."""
    for module in modules:
        ports: Ports | None = module.__dict__.get(PORTS)
        if ports is None:
            continue
        ports.change([entry for entry in ports.entries if entry[0] != link.name])
        if not ports.entries:
            del module.__dict__[PORTS]
            module.__class__ = without_ports(type(module))


@contextmanager
def edited(model: nn.Module, edits: list[Edit]) -> Iterator[None]:
    """The scope in which these ports stand at the model's modules, behind those that are there; scopes may be nested."""
    name = f"for a time {id(edits)}"  # no attachment can have a name with a space
    link = Link(model, name, nn.Module(), name)
    try:
        put(link, edits)
        yield
    finally:
        take_off(link, dict.fromkeys(edit.module for edit in edits))


def _remove(link: Link) -> None:
    model = link.model
    deltas: Any = model._modules["deltas"]
    take_off(link, modules(model).values())
    del deltas._modules[link.name], deltas.attached[link.name]
    if not deltas.attached:
        for setting, before in reversed(deltas.settings):
            setattr(setting.owner, setting.attribute, before)
        del model._modules["deltas"]
        for path, parameter in parameters(model):
            parameter.requires_grad_(deltas.frozen.get(path, parameter.requires_grad))


def attachments(model: nn.Module) -> dict[str, Attachment]:
    """Return the deltas attached to `model`, by name."""
    return {name: link for name, link in links(model).items() if isinstance(link, Attachment)}


def links(model: nn.Module) -> dict[str, Link]:
    """Return all that is attached to `model`, by name: deltas, and pools of them."""
    deltas = model._modules.get("deltas")
    return dict(deltas.attached) if isinstance(deltas, Deltas) else {}
