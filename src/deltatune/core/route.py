"""Routing: many weights on one backbone, and one of them, a combination, or none for each row of a batch.

A route is what is attached while it lasts: for each module, one port made of the ports of all deltas that the batch
needs there (`core.together`). Nothing else is in the model's way, however many weights the pool has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltatune.core import gather  # noqa: F401 (says how ports on linears and hidden states go together)
from deltatune.core.attach import (
    Attachment,
    Link,
    change_settings,
    free_name,
    hang,
    links,
    plan,
    put,
    take_off,
)
from deltatune.core.calls import Ports
from deltatune.core.delta import Delta, Placement, as_delta, place
from deltatune.core.fit import check_backbone, check_tensors
from deltatune.core.leaves import Leaves, hold
from deltatune.core.method import Method
from deltatune.core.ports import Call, Edit
from deltatune.core.rows import Rows
from deltatune.core.site import anatomy
from deltatune.core.store import read
from deltatune.core.together import Fusion, fuse, rowless
from deltatune.core.weights import Weights, fingerprint, init
from deltatune.errors import DeltaTuneError, nearest

Row = str | Sequence[str] | None
What = Weights | Delta | Method | Path | str


class RowCount:
    """pre on the root: a batch has as many rows as its route; scope: `generate` may multiply them while it runs."""

    def __init__(self, rows: int) -> None:
        self.rows, self.multiplied = rows, False
        self.method = f"route of {rows} rows"

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        self._check(args, kwargs, self.multiplied)
        return args, kwargs

    @contextmanager
    def scope(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """The scope of one call of `generate`."""
        self._check(args, kwargs, multiplied=False)
        self.multiplied = True
        try:
            yield
        finally:
            self.multiplied = False

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any], multiplied: bool) -> None:
        batches = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1)
        count = next((v.shape[0] for v in batches), self.rows)
        if count % self.rows if multiplied else count != self.rows:
            raise DeltaTuneError(f"the route has {self.rows} rows and the batch {count}; name one entry for each row.")


class Entry:
    """What one row of a route may ask for: one member of the pool, or several of them together."""

    def __init__(self, edits: list[Edit]) -> None:
        self.edits = edits
        self.here: dict[nn.Module, Ports] = {}
        for edit in edits:
            self.here.setdefault(edit.module, Ports(edit.module)).entries.append(("", edit))
        for ports in self.here.values():
            ports.change(list(dict.fromkeys(ports.entries)))


class Member(Attachment):
    """One member of a pool, to look at and to train: not attached by itself."""

    def set(self, weights: Weights) -> None:
        raise DeltaTuneError(f"{self.name!r} is a member of a pool; remove it and add the other weights.")

    def __repr__(self) -> str:
        return f"<member {self.name}: {self.what}>"


class Pool(Link):
    """Many weights for one backbone; `route` chooses among them for each row of a batch. Made by `pool`."""

    def __init__(self, model: nn.Module, name: str, resident: int | None, train: bool, check: bool) -> None:
        super().__init__(model, name, nn.Module(), "pool")
        self.resident, self.train, self.check = resident, train, check
        self._parts, self._fingerprint = anatomy(model), fingerprint(model)
        self._members: dict[str, Weights] = {}
        self._placed: dict[Delta, list[Placement]] = {}
        self._held: OrderedDict[str, Leaves] = OrderedDict()  # the least recently routed first
        self._entries: dict[tuple[str, ...], Entry] = {}
        self._uses: dict[str, set[tuple[str, ...]]] = {}  # the entries that each member is part of
        self._routed: frozenset[str] = frozenset()
        self.routing = False  # whether a route is running

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the members, in the order in which they were added."""
        return tuple(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def add(self, name: str, what: What, seed: int = 0) -> None:
        """Add weights, a delta with fresh weights, or a saved folder; the model is not touched.

        Raises `DeltaTuneError`, leaving the pool as it was, when the name is taken, the weights are for another backbone,
        or a method cannot be routed.
        """
        if name in self._members:
            raise DeltaTuneError(f"the pool has a delta called {name!r} already; remove it or choose another name.")
        if not name or (self.train and not name.isidentifier()):
            raise DeltaTuneError(f"{name!r} cannot name a delta of this pool; choose a plain name such as 'sst2'.")
        weights = self._weights_of(what, seed)
        check_backbone(weights.backbone, self._fingerprint, self.check)
        check_tensors(weights, self._placements(weights.delta))
        self._members[name] = weights
        if self.train:
            self.leaves.add_module(name, self._leaves(name))

    def remove(self, name: str) -> None:
        """Forget a member; raises `DeltaTuneError` while a batch that needs it is in flight."""
        self._find(name)
        if name in self._routed:
            raise DeltaTuneError(f"{name!r} is part of the route that is running; leave the route first.")
        self._release(name)
        del self._members[name]
        self.leaves._modules.pop(name, None)

    def __getitem__(self, name: str) -> Member:
        """Return a member: its delta, its weights with the numbers of now, and in a pool that trains its parameters."""
        weights = self._members[self._find(name)]
        return Member(self.model, name, weights, self._placements(weights.delta), self._leaves(name))

    @contextmanager
    def route(self, rows: str | Sequence[Row]) -> Iterator[Pool]:
        """The scope in which each row of a batch has its own delta: a name, several names (in that order), or None for none.

        One name alone is for all rows of any batch. Calls and `generate` (beams and returned sequences included) keep the
        rows apart; a backward pass belongs into the scope. Raises `DeltaTuneError` for unknown names, within another
        route, and when a batch has other rows.
        """
        self._check_free()
        every, rows = isinstance(rows, str), [rows] if isinstance(rows, str) else rows
        wanted = [() if row is None else (row,) if isinstance(row, str) else tuple(row) for row in rows]
        if not wanted:
            raise DeltaTuneError(
                "the route is empty; name one entry for each row of the batch, None for the bare backbone."
            )
        self._routed = frozenset(self._find(name) for names in wanted for name in names)
        edits: list[Edit] = []
        try:
            edits = self._entry(wanted[0]).edits if every else [*self._edits(wanted), *self._counting(len(wanted))]
            self.routing = True
            put(self, edits)
            yield self
        finally:
            self._routed, self.routing = frozenset(), False
            take_off(self, dict.fromkeys(edit.module for edit in edits))

    def _check_free(self) -> None:
        if not self.attached:
            raise DeltaTuneError(f"{self.name!r} is not on the model any more; make a pool anew.")
        running = [link.name for link in links(self.model).values() if isinstance(link, Pool) and link.routing]
        if running:
            raise DeltaTuneError(f"a route of {running[0]!r} is running on this model; leave it first.")

    def _counting(self, rows: int) -> list[Edit]:
        port = RowCount(rows)
        return [Edit(self.model, "pre", port), Edit(self.model, "scope", port)]

    def _edits(self, wanted: list[tuple[str, ...]]) -> list[Edit]:
        entries = {names: self._entry(names) for names in dict.fromkeys(wanted) if names}
        if len(set(wanted)) == 1 and not any(self.model in entry.here for entry in entries.values()):
            return [edit for entry in entries.values() for edit in entry.edits]
        modules = dict.fromkeys(module for entry in entries.values() for module in entry.here)
        fusion = Fusion(self.model, len(wanted), next(self.model.parameters()).device, modules)
        index = {names: [i for i, row in enumerate(wanted) if row == names] for names in entries}
        deltas = [(Rows(index[n], len(wanted), fusion.device), entry.here) for n, entry in entries.items()]
        return [edit for module in modules for edit in fuse(module, deltas, fusion)]

    def _entry(self, names: tuple[str, ...]) -> Entry:
        for name in names:
            self._leaves(name)
        if names not in self._entries:
            edits: list[Edit] = []
            for name in names:
                placements = self._placements(self._members[name].delta)
                more, settings = plan(self.model, placements, self._held[name], self._parts)
                tables = {p.site.path: table for p in placements if (table := rowless(p.site)) is not None}
                for path, table in tables.items():
                    settings += table.settings(self.model, path)
                change_settings(self, settings)
                edits += more
                self._uses.setdefault(name, set()).add(names)
            self._entries[names] = Entry(edits)
        return self._entries[names]

    def _leaves(self, name: str) -> Leaves:
        if name not in self._held:
            weights = self._members[name]
            self._held[name] = hold(self.model, weights, self._placements(weights.delta), learn=self.train)
            self._make_room()
        self._held.move_to_end(name)
        return self._held[name]

    def _make_room(self) -> None:
        if self.resident is None or self.train:
            return
        needed = len(self._routed)
        if needed > self.resident:
            raise DeltaTuneError(f"the route needs {needed} deltas at once; the pool keeps {self.resident} resident.")
        while len(self._held) > self.resident:
            self._release(next(name for name in self._held if name not in self._routed))

    def _release(self, name: str) -> None:
        self._held.pop(name, None)
        for names in self._uses.pop(name, ()):
            self._entries.pop(names, None)

    def _placements(self, delta: Delta) -> list[Placement]:
        if delta not in self._placed:
            placements = place(self.model, delta)
            for placement in placements:
                self._check_routable(placement)
            self._placed[delta] = placements
        return self._placed[delta]

    def _check_routable(self, placement: Placement) -> None:
        method, path = placement.method, placement.site.path
        if "route" in method.breaks:
            raise DeltaTuneError(f"{method} cannot be routed: {method.breaks['route']}. Attach it alone.")
        module = self.model.get_submodule(path)
        over = self.model.get_submodule(path.rpartition(".")[0]) if path else module
        apart = rowless(placement.site) is not None and method.acts not in ("linear", "tensor")
        if apart or any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in (module, over)):
            raise DeltaTuneError(
                f"{method} at {path!r} cannot be routed, because what this module computes has no rows of the batch in front; "
                "leave it out of the where."
            )

    def _weights_of(self, what: What, seed: int) -> Weights:
        if isinstance(what, Weights):
            return what
        if isinstance(what, (str, Path)):
            return read(self.model, Path(what), self.check)
        return init(as_delta(what), self.model, seed)

    def _find(self, name: str) -> str:
        if name not in self._members:
            some = ", ".join(list(self._members)[:5]) or "nothing"
            raise DeltaTuneError(f"the pool has no delta {name!r}.{nearest(name, self._members)} It holds {some}.")
        return name

    def __repr__(self) -> str:
        return f"<{'attached' if self.attached else 'detached'} {self.name}: pool of {len(self)} deltas, {len(self._held)} resident>"


def pool(
    model: nn.Module,
    weights: Mapping[str, What] | None = None,
    resident: int | None = None,
    train: bool = False,
    check: bool = True,
) -> Pool:
    """Return a pool of weights on `model`, for `route` to choose from; it freezes the backbone until it is detached.

    `resident` bounds how many members stay on the backbone's device, the last routed ones; the others wait on the host.
    With `train`, members are copies whose leaves learn and hang at `model.deltas.<pool>.<name>`; else they are read from
    the weights given, which are not to be changed meanwhile.
    """
    made = Pool(model, free_name(model, None, "pool"), resident, train, check)
    for name, what in (weights or {}).items():
        made.add(name, what)
    hang(made, [])
    return made
