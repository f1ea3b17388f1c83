"""Ports together: what the ports of different deltas become at one module when each has its own rows of a batch.

`TOGETHER` says it for each kind of port. Here they run one after the other, each on its own rows; `core.gather` makes one
of those that can be one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.calls import Ports, run, standing
from deltatune.core.ports import PORTS, BranchPort, Call, Edit, LadderPort, Setting, StreamPort, Verb
from deltatune.core.rows import Rows, Split
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError

Whole = Mapping[nn.Module, Ports]  # all ports of one delta, by module


@dataclass(frozen=True)
class Share:
    """One delta's part in a route at one module: its rows, its port, all of its ports there, and those at all modules."""

    rows: Rows
    port: Any
    here: Ports
    whole: Whole


@dataclass
class Fusion:
    """What is known of a route while it is made, and what its ports have to share (a prompt that every block reads)."""

    model: nn.Module
    total: int
    device: torch.device
    modules: Mapping[nn.Module, Any]
    made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made for `key`, made now if need be."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def split(self, shares: Sequence[Share]) -> Split:
        """Return the rows of several shares, and those of nobody."""
        parts = tuple(share.rows for share in shares)
        return self.once(tuple(p.index for p in parts), lambda: Split(parts, self.total, self.device))


@dataclass(frozen=True)
class Joint:
    """How ports of one kind go together; lower ranks come first, equal ones keep the order in which each delta has them."""

    make: Callable[[list[Share], Fusion], Any]  # None where there is nothing to do
    rank: int = 9


TOGETHER: dict[type, Joint] = {}


@dataclass(frozen=True)
class Rowless:
    """How a module is routed whose calls have no rows of the batch in front, and what it needs changed on the backbone."""

    fuse: Callable[[nn.Module, list[tuple[Rows, Whole]], Fusion], list[Edit]]
    settings: Callable[[nn.Module, str], list[Setting]]


ROWLESS: dict[str, Rowless] = {}  # by the last part of the module's path


def rowless(site: Site) -> Rowless | None:
    """Return how the module of a site is routed when its calls have no rows, or None for a module like any other."""
    return ROWLESS.get(site.path.rpartition(".")[2])


def joint(port: Any) -> Joint:
    """Return how ports of this kind go together; raises `DeltaTuneError` when that is not known."""
    for kind in type(port).__mro__:
        if kind in TOGETHER:
            return TOGETHER[kind]
    raise DeltaTuneError(f"{port.method} cannot be routed; attach it alone.")


def fuse(module: nn.Module, deltas: Sequence[tuple[Rows, Whole]], fusion: Fusion) -> list[Edit]:
    """Return the edits of one module for the deltas that have ports there, each with its own rows."""
    shares = [(rows, whole) for rows, whole in deltas if module in whole]
    changed = [port.site for _, whole in shares for _, ports in whole[module].param for port in ports]
    if changed and (table := rowless(changed[0])) is not None:
        return table.fuse(module, shares, fusion)
    verbs: tuple[Verb, ...] = ("heads",)
    edits = []
    if changed:
        edits.append(Edit(module, "around", ModuleRows(module, shares, fusion)))
    else:
        verbs = ("pre", "post", "heads")
    for verb in verbs:
        edits += [Edit(module, verb, port) for port in _in_turn(module, verb, shares, fusion)]
    return edits


def _in_turn(module: nn.Module, verb: Verb, shares: list[tuple[Rows, Whole]], fusion: Fusion) -> list[Any]:
    """Return one port for each turn in which ports of one kind are next in the order of their deltas."""
    queues = [
        [Share(rows, port, whole[module], whole) for port in sorted(vars(whole[module])[verb], key=_rank)]
        for rows, whole in shares
    ]
    ports = []
    while any(queues):
        kind = type(min((queue[0].port for queue in queues if queue), key=_rank))
        turn = [queue.pop(0) for queue in queues if queue and type(queue[0].port) is kind]
        ports.append(joint(turn[0].port).make(turn, fusion))
    return [port for port in ports if port is not None]


def _rank(port: Any) -> int:
    return joint(port).rank


class Together:
    """Several ports of one kind, each with its rows."""

    def __init__(self, shares: list[Share], fusion: Fusion) -> None:
        self.shares, self.split = shares, fusion.split(shares)
        self.method = " | ".join(dict.fromkeys(str(share.port.method) for share in shares))


class StreamRows(Together):
    """pre and post of hidden states, each port on its own rows."""

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        h, put = _hidden(self.shares[0].port, args, kwargs)
        pieces = [share.port.pre(share.here, (share.rows.take(h),), {})[0][0] for share in self.shares]
        return put(self.split.join(pieces, h))

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        h, *rest = y if isinstance(y, tuple) else (y,)
        pieces = [share.port.post(share.here, (), {}, share.rows.take(h)) for share in self.shares]
        joined = self.split.join(pieces, h)
        return (joined, *rest) if isinstance(y, tuple) else joined


def _hidden(port: StreamPort, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Call]]:
    """Return the hidden state of a call, and what puts another in its place."""
    if args:
        return args[0], lambda h: ((h, *args[1:]), kwargs)
    return kwargs[port.first], lambda h: (args, {**kwargs, port.first: h})


class BranchRows(StreamRows):
    """pre keeps each port's rows of what goes into a sub-layer; post changes them in what comes out."""

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        h, _ = _hidden(self.shares[0].port, args, kwargs)
        for share in self.shares:
            share.port.pre(share.here, (share.rows.take(h),), {})
        return args, kwargs


class LinearRows(Together):
    """post of linear layers, each port on its own rows."""

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        pieces = [share.port.post(share.here, (share.rows.take(x),), {}, share.rows.take(y)) for share in self.shares]
        return self.split.join(pieces, y)


class ModuleRows(Together):
    """around: the module is called once for each delta, on its rows and with its parameters, and once for the rest."""

    def __init__(self, module: nn.Module, deltas: list[tuple[Rows, Whole]], fusion: Fusion) -> None:
        shares = [Share(rows, whole[module].entries[0][1].port, whole[module], whole) for rows, whole in deltas]
        super().__init__(shares, fusion)
        inside = [m for m in module.modules() if m is not module and m in fusion.modules]
        runs = [(share.rows, share.here, share.whole) for share in shares]
        if self.split.rest.count:
            runs.append((self.split.rest, Ports(module), {}))
        self.runs = [(rows, own, [(m, _alone(m, whole)) for m in inside]) for rows, own, whole in runs]

    def around(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pieces = []
        for rows, own, inside in self.runs:
            with standing(inside):
                pieces.append(run(own, *self.part(rows, args, kwargs)))
        return self.whole(pieces)

    def part(self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the call for some rows."""
        return _rows_of_call(rows, args, kwargs)

    def whole(self, pieces: list[Any]) -> Any:
        """Return the output for all rows from that of each delta, and of the rest at the end."""
        return _join_outputs(self.split, pieces)


def _alone(module: nn.Module, whole: Whole) -> Ports:
    """Return the ports of a module when one delta has all rows, with what is attached beside the route."""
    ports = Ports(module)
    beside = module.__dict__[PORTS].entries if PORTS in module.__dict__ else []
    ports.change([*beside, *(whole[module].entries if module in whole else ())])
    return ports


def _rows_of_call(rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return a call for some rows: of the first tensor, and of all others that have as many rows and are no mask for all."""
    first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))

    def take(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Tensor):
            own = value is first or (value.dim() > 1 and value.shape[0] == first.shape[0])
            return rows.take(value) if own else value
        raise DeltaTuneError(f"a {type(value).__name__} among the arguments of a module cannot be taken apart by rows.")

    shared = {name: value for name, value in kwargs.items() if name == "attn_mask"}  # torch's mask is one for all rows
    return tuple(map(take, args)), {**{name: take(value) for name, value in kwargs.items()}, **shared}


def _join_outputs(split: Split, pieces: list[Any]) -> Any:
    if isinstance(pieces[0], tuple):
        return tuple(_join_outputs(split, list(items)) for items in zip(*pieces, strict=True))
    return pieces[0] if pieces[0] is None else split.assemble(pieces)


TOGETHER[BranchPort] = Joint(BranchRows)
TOGETHER[LadderPort] = Joint(StreamRows)
