"""The where language: a string that selects the sites of a delta.

    [stack.]role[layers][:in|out]      one role, e.g. `attn.q`, `encoder.ffn.down[6:]`, `block[-1]:out`
    encoder. decoder. input.           a stack; `input` is the one that reads the text: the encoder, or the only one
    {a,b}                              a set, anywhere: `attn.{q,v}`, `{attn.o,ffn.down}:out`
    path:model.layers.*.mlp[:in|out]   modules by path; `*` stands for one name, `**` for any number
    ...?                               may match nothing (for default places that not every backbone has)

Layers are a Python index or slice within the stack. A where without `?` that matches nothing is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from torch import nn

from deltatune.core import walk
from deltatune.core.site import ROLES, Anatomy, Place, Site, describe
from deltatune.errors import DeltaTuneError, nearest

ATOM = re.compile(
    r"(?:(?P<stack>encoder|decoder|input)\.)?(?P<role>[a-z]+(?:\.[a-z]+)?)"
    r"(?:\[(?P<layers>[-0-9:]+)\])?(?::(?P<side>in|out))?(?P<optional>\?)?$"
)
PATH = re.compile(r"path:(?P<path>.*?)(?::(?P<side>in|out))?(?P<optional>\?)?$")


@dataclass(frozen=True)
class Atom:
    """One alternative of a where, without sets."""

    text: str
    role: str = ""
    stack: str | None = None
    layers: slice | int | None = None
    side: Literal["in", "out"] = "out"
    optional: bool = False
    path: str | None = None


def expand(where: str) -> list[str]:
    """Expand `{a,b}` sets; a `?` behind a set or a member moves to the end of what it makes optional."""
    depths = list(accumulate((sign == "{") - (sign == "}") for sign in where))
    if depths and (depths[-1] or min(depths) < 0):
        raise DeltaTuneError(f"the braces in {where!r} do not match; write sets as {{a,b}}.")
    return _expand(where)


def _expand(where: str) -> list[str]:
    start = where.find("{")
    if start < 0:
        return [where]
    choices, tail = _split(where, start)
    tails = _expand(tail)
    return [_join(where[:start], middle, end) for choice in choices for middle in _expand(choice) for end in tails]


def _split(where: str, start: int) -> tuple[list[str], str]:
    """Split the set that opens at `start` into its members, and return what follows it."""
    depth, begin, choices = 0, start + 1, []
    for at in range(start, len(where)):
        depth += (where[at] == "{") - (where[at] == "}")
        if (depth == 1 and where[at] == ",") or depth == 0:
            choices.append(where[begin:at].strip())
            begin = at + 1
        if depth == 0:
            break
    return choices, where[begin:]


def _join(before: str, middle: str, after: str) -> str:
    optional = "?" if middle.endswith("?") or after.endswith("?") else ""
    return before + middle.removesuffix("?") + after.removesuffix("?") + optional


def parse(where: str) -> list[Atom]:
    """Parse a where into its alternatives; raises `DeltaTuneError` with the nearest role when one is unknown."""
    if not where.strip():
        raise DeltaTuneError("a where is empty; write for example attn.{q,v}, ffn.down[6:] or path:model.layers.*.mlp.")
    return [_atom(text.strip(), where) for text in expand(where.strip())]


def _atom(text: str, where: str) -> Atom:
    by_path = PATH.match(text)
    if by_path:
        return Atom(text, side=_side(by_path["side"]), optional=bool(by_path["optional"]), path=by_path["path"])
    found = ATOM.match(text)
    if not found or found["role"] not in ROLES:
        word = found["role"] if found else text
        raise DeltaTuneError(
            f"there is no role {word!r} (in the where {where!r}).{nearest(word, ROLES)} Roles: {', '.join(ROLES)}; or path:..."
        )
    return Atom(
        text,
        found["role"],
        found["stack"],
        _layers(found["layers"], where),
        _side(found["side"]),
        bool(found["optional"]),
    )


def _side(text: str | None) -> Literal["in", "out"]:
    return "in" if text == "in" else "out"


def _layers(text: str | None, where: str) -> slice | int | None:
    if text is None:
        return None
    try:
        if ":" not in text:
            return int(text)
        layers = slice(*(int(piece) if piece else None for piece in text.split(":")))
        range(0)[layers]  # a step of zero is found here
        return layers
    except (ValueError, TypeError):
        raise DeltaTuneError(
            f"[{text}] in {where!r} is not a Python index or slice; write [3], [-1], [6:] or [::2]."
        ) from None


def select(model: nn.Module, where: str, anatomy: Anatomy) -> list[Site]:
    """Return the sites of `where` in `model`, in the order of the alternatives and of the blocks, each module once."""
    modules = walk.modules(model)
    found: dict[tuple[int, object, str | None, str], Site] = {}
    for atom in parse(where):
        places = _by_path(atom, modules) if atom.path is not None else _by_role(atom, anatomy)
        if not places and not atom.optional:
            raise _nothing(atom, where, anatomy, modules)
        for place in places:
            module = modules[place.path]  # under several paths it is still one place, with one set of ports
            found.setdefault((id(module), place.part, place.exit, atom.side), _site(place, atom, module, anatomy))
    return list(found.values())


def _by_path(atom: Atom, modules: dict[str, nn.Module]) -> list[Place]:
    pattern = _glob(atom.path or "")
    return [Place(role="path", path=path) for path in modules if pattern.match(path) and path.split(".")[0] != "deltas"]


def _glob(path: str) -> re.Pattern[str]:
    *before, last = path.split(".")
    pieces = [r"(?:.+\.)?" if name == "**" else _name(name) + r"\." for name in before]
    return re.compile("".join(pieces) + (".*" if last == "**" else _name(last)) + "$")


def _name(name: str) -> str:
    return "[^.]+" if name == "*" else "[^.]*".join(map(re.escape, name.split("*")))


def _by_role(atom: Atom, anatomy: Anatomy) -> list[Place]:
    names = {stack.name: range(stack.layers) for stack in anatomy.stacks}
    stack = anatomy.stacks[0].name if atom.stack == "input" and anatomy.stacks else atom.stack
    return [
        place
        for place in anatomy.places
        if place.role == atom.role
        and (stack is None or place.stack == stack)
        and (
            atom.layers is None or (place.layer is not None and place.layer in _chosen(names[place.stack], atom.layers))
        )
    ]


def _chosen(layers: range, wanted: slice | int) -> range:
    if isinstance(wanted, slice):
        return layers[wanted]
    index = wanted + len(layers) if wanted < 0 else wanted
    return range(index, index + 1)


def _site(place: Place, atom: Atom, module: nn.Module, anatomy: Anatomy) -> Site:
    stack = next((s for s in anatomy.stacks if s.name == place.stack), None)
    heads = stack.heads if stack else None
    site = Site(place.role, place.path, place.stack, place.layer, place.part, atom.side, heads=heads, exit=place.exit)
    return describe(site, module, stack.width if stack else 0)


def _nothing(atom: Atom, where: str, anatomy: Anatomy, modules: dict[str, nn.Module]) -> DeltaTuneError:
    if atom.path is not None:
        return DeltaTuneError(
            f"no module of this {anatomy.family} has the path {atom.path!r} (in the where {where!r}).{nearest(atom.path, modules)}"
        )
    if not anatomy.places:
        some = ", ".join(list(modules)[1:6])
        return DeltaTuneError(
            f"{where!r} names a role, but the roles of {anatomy.family} are not known; address its modules by path, e.g. path:{some}."
        )
    roles = list(dict.fromkeys(p.role for p in anatomy.places))
    sizes = ", ".join(f"{s.name or 'the stack'} has {s.layers} layers" for s in anatomy.stacks)
    return DeltaTuneError(
        f"{atom.text!r} (in the where {where!r}) matches nothing in this {anatomy.family}: {sizes}; its roles are {', '.join(roles)}."
    )
