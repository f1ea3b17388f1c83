"""Named values: frozen dataclasses that print, hash, compare and travel as JSON or as text.

A class becomes known by being defined; nothing else has to be listed. The text form is the Python expression
that builds the value, read by a closed grammar (names, literals, calls, `.at`, `+`), never by `eval`.
"""

from __future__ import annotations

import ast
import json
from dataclasses import MISSING, Field, fields
from functools import cache
from sys import float_info
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from deltatune.errors import DeltaTuneError, nearest


class Spec:
    """A value that is rebuilt from its class name and its fields."""

    known: ClassVar[dict[str, type[Spec]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Spec.known[cls.__name__] = cls

    def __str__(self) -> str:
        shown = [f"{f.name}={literal(_value(self, f))}" for f in fields_of(type(self)) if not _is_default(self, f)]
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_json(self) -> dict[str, Any]:
        """Return `{class name: {field: value}}` with every field, defaults included, so that a later default cannot change it."""
        return {type(self).__name__: {f.name: _encode(_value(self, f)) for f in fields_of(type(self))}}


def literal(value: Any) -> str:
    """Return the text that the grammar reads back as `value`."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # every escape of JSON means the same in Python
    if isinstance(value, tuple):
        return "(" + ", ".join(map(literal, value)) + ("," if len(value) == 1 else "") + ")"
    return str(value) if isinstance(value, Spec) else repr(value)


def fields_of(cls: type) -> tuple[Field, ...]:
    """Return the dataclass fields that a concrete `Spec` declares."""
    return fields(cls)


def concrete(kind: type[Spec] = Spec) -> dict[str, type[Spec]]:
    """Return the known frozen dataclasses that are a `kind`, by name."""
    return {n: c for n, c in sorted(Spec.known.items()) if issubclass(c, kind) and "__dataclass_params__" in c.__dict__}


def build(name: str, given: dict[str, Any], kind: type[Spec] = Spec) -> Any:
    """Build the value `name(**given)`; raises `DeltaTuneError` with the nearest names when either is unknown."""
    classes = concrete(kind)
    if name not in classes:
        raise DeltaTuneError(
            f"there is no {kind.__name__.lower()} {name!r}.{nearest(name, classes)} Known: {', '.join(classes)}."
        )
    known = [f.name for f in fields_of(classes[name])]
    for field in given:
        if field not in known:
            raise DeltaTuneError(
                f"{name} has no field {field!r}.{nearest(field, known)} Its fields: {', '.join(known) or 'none'}."
            )
    missing = [f.name for f in fields_of(classes[name]) if f.default is MISSING and f.name not in given]
    if missing:
        raise DeltaTuneError(f"{name} needs a value for {', '.join(missing)}.")
    hints = _hints(classes[name])
    for field, value in given.items():
        if not _fits(value, hints[field]):
            kinds = _describe(hints[field])
            raise DeltaTuneError(f"{name} needs {kinds} for {field}; found {field}={literal(value)}.")
    return classes[name](**given)


@cache
def _hints(cls: type[Spec]) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from text or JSON is what a field's annotation says; numbers must be finite."""
    match get_origin(hint):
        case None if hint is float:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= float_info.max
        case None if hint is int:
            return isinstance(value, int) and not isinstance(value, bool)
        case None:
            return not isinstance(hint, type) or isinstance(value, hint)
        case origin if origin is Literal:
            return value in get_args(hint)
        case origin if origin in (Union, UnionType):
            return any(_fits(value, choice) for choice in get_args(hint))
        case origin if origin is tuple:
            item, *more = get_args(hint)
            wanted = [item] * len(value) if more == [...] and isinstance(value, tuple) else [item, *more]
            return isinstance(value, tuple) and len(value) == len(wanted) and all(map(_fits, value, wanted))
    return True


def _describe(hint: Any) -> str:
    """Return an annotation in words."""
    words = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False", NoneType: "None"}
    if get_origin(hint) is Literal:
        return " or ".join(map(literal, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    if hint in words:
        return words[hint]
    if isinstance(hint, type) and issubclass(hint, Spec):
        return f"one of {', '.join(concrete(hint))}"
    return f"a {hint}"


def from_json(value: Any, kind: type[Spec] = Spec) -> Any:
    """Rebuild a value from `to_json`."""
    if not (isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), dict)):
        raise DeltaTuneError(f'a {kind.__name__.lower()} is written {{"Name": {{"field": value}}}}; found {value!r}.')
    name, given = next(iter(value.items()))
    return build(name, {field: _decode(inner) for field, inner in given.items()}, kind)


def read(text: str) -> ast.expr:
    """Parse `text` as one Python expression; raises `DeltaTuneError` at the place where it stops making sense."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        place = f" at column {error.offset}" if error.offset else ""
        raise DeltaTuneError(f"cannot read {text!r}: {error.msg}{place}.") from None
    except (UnicodeEncodeError, RecursionError, MemoryError) as error:
        cause = "it is not Unicode text" if isinstance(error, UnicodeEncodeError) else "it is too long or too deep"
        raise DeltaTuneError(f"cannot read {text[:60]!r}...: {cause}.") from None


def evaluate(node: ast.expr, text: str, kind: type[Spec] = Spec) -> Any:
    """Turn a parsed expression of literals and known constructors into a value; a constructor must make a `kind`."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            names = [f.name for f in fields_of(concrete()[name])] if name in concrete() else []
            if len(args) > len(names) > 0:
                raise DeltaTuneError(f"{name} takes at most {len(names)} values; {len(args)} are written in {text!r}.")
            pairs = [(names[i] if i < len(names) else str(i), evaluate(a, text)) for i, a in enumerate(args)]
            pairs += [(k.arg or "**", evaluate(k.value, text)) for k in keywords]
            twice = {field for field, _ in pairs if [f for f, _ in pairs].count(field) > 1}
            if twice:
                raise DeltaTuneError(f"{name} is given {', '.join(sorted(twice))} twice in {text!r}.")
            return build(name, dict(pairs), kind)
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(evaluate(item, text) for item in items)
        case ast.Constant(value=value) if value is None or isinstance(value, (int, float, str, bool)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if isinstance(value, (int, float)):
            return -value
        case ast.Name(id=name):
            return build(name, {}, kind)
    raise DeltaTuneError(
        f'{ast.unparse(node)!r} in {text!r} is not a value; write for example LoRA(rank=8).at("attn.q").'
    )


def _is_default(spec: Spec, field: Field) -> bool:
    return field.default is not MISSING and spec.__dict__[field.name] == field.default


def _value(spec: Spec, field: Field) -> Any:
    """Return a field's value; a whole number in a field of numbers as float, so that equal values read the same."""
    value = spec.__dict__[field.name]
    return float(value) if isinstance(value, int) and _hints(type(spec))[field.name] is float else value


def _encode(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return from_json(value)
    return tuple(_decode(item) for item in value) if isinstance(value, list) else value
