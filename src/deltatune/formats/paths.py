"""Module paths of other libraries as paths of a live model, which may have a head around it or none."""

from __future__ import annotations

from torch import nn

from deltatune.core.site import Anatomy, Place
from deltatune.errors import DeltaTuneError, nearest


def resolve(model: nn.Module, path: str) -> str:
    """Return a path in a file as one of this model; raises `DeltaTuneError` when it has no such module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")):
        if candidate in modules and candidate.split(".")[0] != "deltas":
            return candidate
    raise DeltaTuneError(
        f"the file names the module {path!r}, which this {type(model).__name__} does not have.{nearest(path, modules)}"
    )


def role_at(parts: Anatomy, path: str, *roles: str) -> str:
    """Return which of some roles the module at a path plays by itself, or an empty string."""
    found = [p.role for p in parts.places if p.path == path and p.role in roles and p.exit is None and p.part is None]
    return found[0] if found else ""


def place_of(parts: Anatomy, role: str, layer: int | None) -> Place:
    """Return the place of a role in a block of the only stack; raises `DeltaTuneError` when there is none."""
    found = [place for place in parts.places if place.role == role and (layer is None or place.layer == layer)]
    if len(found) != 1:
        where = "" if layer is None else f" in the block {layer}"
        raise DeltaTuneError(f"the file names {role}{where}, which this {parts.family} does not have.")
    return found[0]
