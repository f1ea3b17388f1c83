"""Named values: frozen dataclasses that print, hash, compare and travel as JSON or as text.

A class becomes known by being defined; nothing else has to be listed. The text form is the Python expression
that builds the value, read by a closed grammar (names, literals, calls, `.at`, `+`), never by `eval`.
"""

from __future__ import annotations

import ast
from dataclasses import MISSING, Field, fields
from typing import Any, ClassVar

from deltatune.errors import DeltaTuneError, nearest


class Spec:
    """A value that is rebuilt from its class name and its fields."""

    known: ClassVar[dict[str, type[Spec]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Spec.known[cls.__name__] = cls

    def __str__(self) -> str:
        shown = [
            f"{f.name}={literal(self.__dict__[f.name])}" for f in fields_of(type(self)) if not _is_default(self, f)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_json(self) -> dict[str, Any]:
        """Return `{class name: {field: value}}` with every field, defaults included, so that a later default cannot change it."""
        return {type(self).__name__: {f.name: _encode(self.__dict__[f.name]) for f in fields_of(type(self))}}


def literal(value: Any) -> str:
    """Return the text that the grammar reads back as `value`."""
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
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
    return classes[name](**given)


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
        raise DeltaTuneError(f"cannot read {text!r}: {error.msg} at column {error.offset}.") from None


def evaluate(node: ast.expr, text: str) -> Any:
    """Turn a parsed expression of literals and known constructors into a value."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            names = [f.name for f in fields_of(concrete()[name])] if name in concrete() else []
            if len(args) > len(names) > 0:
                raise DeltaTuneError(f"{name} takes at most {len(names)} values; {len(args)} are written in {text!r}.")
            given = {names[i] if i < len(names) else str(i): evaluate(a, text) for i, a in enumerate(args)}
            return build(name, given | {k.arg or "**": evaluate(k.value, text) for k in keywords})
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return tuple(evaluate(item, text) for item in items)
        case ast.Constant(value=value) if value is None or isinstance(value, (int, float, str, bool)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if isinstance(value, (int, float)):
            return -value
        case ast.Name(id=name):
            return build(name, {})
    raise DeltaTuneError(
        f'{ast.unparse(node)!r} in {text!r} is not a value; write for example LoRA(rank=8).at("attn.q").'
    )


def _is_default(spec: Spec, field: Field) -> bool:
    return field.default is not MISSING and spec.__dict__[field.name] == field.default


def _encode(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return from_json(value)
    return tuple(_decode(item) for item in value) if isinstance(value, list) else value
