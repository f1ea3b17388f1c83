"""Parts: a method at one module with its leaves, as a reader finds them; assembled into the weights of a delta."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from deltatune.core.delta import Delta, Placement, Term, place
from deltatune.core.fit import check_tensors
from deltatune.core.method import Method
from deltatune.core.site import Anatomy
from deltatune.core.weights import Weights, fingerprint, generate
from deltatune.core.where import select
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors


@dataclass(frozen=True, eq=False)
class Part:
    """A method at one module, and its leaves by what stands behind the module's path in their names.

    A part with a `role` is at the place of that role, one with a `where` stands for all that it finds; others are at modules
    by their path. Parts that share leaves and do not agree on them have another `group`.
    """

    path: str
    method: Method
    leaves: Tensors
    side: Literal["in", "out"] = "out"
    group: str = ""
    role: str = ""
    where: str = ""

    def name(self, term: int, leaf: str) -> str:
        """Return the name of a leaf in the weights."""
        return f"{term}.{self.path}{':in' if self.side == 'in' else ''}.{leaf}"


def assemble(model: nn.Module, anatomy: Anatomy, parts: Sequence[Part], seed: int = 0) -> Weights:
    """Return weights with one term for each method, place and group, in the order in which they come.

    Leaves that are stored and not in a file are computed from the model, as a fresh delta's are.
    """
    groups: dict[tuple[Method, str, str, str, str], list[Part]] = {}
    for part in parts:
        groups.setdefault((part.method, part.side, part.group, part.role, part.where), []).append(part)
    wheres = [
        where or where_of(model, anatomy, [part.path for part in own], side, role)
        for (_, side, _, role, where), own in groups.items()
    ]
    delta = Delta(tuple(Term(where, key[0]) for where, key in zip(wheres, groups, strict=True)))
    placements = place(model, delta)
    at = {(p.term, p.site.path, p.site.tensor or ""): p for p in placements}
    shared = {p.name(leaf) for p in placements for leaf, declared in p.leaves.items() if declared.scope == "delta"}
    tensors: Tensors = {}
    fixed: Tensors = {}
    for index, own in enumerate(groups.values()):
        for part in own:
            for leaf, tensor in part.leaves.items():
                name, trained = _declared(at, index, part, leaf)
                if name in tensors and name not in shared:
                    raise DeltaTuneError(f"the file holds {part.method} at {part.path!r} twice.")
                (tensors if trained else fixed)[name] = tensor.contiguous()
    stored = {p.name(leaf) for p in placements for leaf, declared in p.leaves.items() if declared.kind == "stored"}
    if stored - fixed.keys():
        fixed = generate(model, placements, seed, "stored", {}) | fixed
    weights = Weights(delta, tensors, fingerprint(model), seed, fixed=fixed)
    check_tensors(weights, placements)
    return weights


def _declared(at: dict[tuple[int, str, str], Placement], index: int, part: Part, leaf: str) -> tuple[str, bool]:
    """Return the name of a part's leaf in the weights, and whether it is trained."""
    parameter, _, short = leaf.rpartition(".")
    placement = at.get((index, part.path, parameter))
    if placement is None or short not in placement.leaves:
        return part.name(index, leaf), True
    return placement.name(short), placement.leaves[short].trained


def where_of(model: nn.Module, anatomy: Anatomy, paths: list[str], side: str, role: str = "") -> str:
    """Return a where that finds exactly these modules: by role, or by path with `*` for the numbers in it."""
    end = ":in" if side == "in" else ""
    if role:
        return _by_role(anatomy, paths, role) + end
    starred = [".".join("*" if piece.isdigit() else piece for piece in path.split(".")) for path in paths]
    short = _by_path(starred) + end
    found = {site.path for site in select(model, short, anatomy)}
    return short if found == set(paths) else _by_path(paths) + end


def _by_path(paths: Iterable[str]) -> str:
    inside: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        parent, _, name = path.rpartition(".")
        inside.setdefault(parent, []).append(name)
    return "path:" + _set([f"{parent}.{_set(names)}" if parent else _set(names) for parent, names in inside.items()])


def _by_role(anatomy: Anatomy, paths: list[str], role: str) -> str:
    places = [found for found in anatomy.places if found.role == role]
    if {found.path for found in places} == set(paths):
        return role
    wheres = []
    for stack in dict.fromkeys(found.stack for found in places):
        mine = [found for found in places if found.stack == stack]
        layers = [found.layer for found in mine if found.path in set(paths)]
        name = f"{stack}.{role}" if stack else role
        wheres += [name] if len(layers) == len(mine) else [f"{name}[{layer}]" for layer in layers]
    return _set(wheres)


def _set(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{{{','.join(names)}}}"
