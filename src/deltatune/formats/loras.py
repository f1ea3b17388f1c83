"""LoRAs for the writers of libraries that know nothing else: at linear layers, one at each, in all blocks alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from deltatune.core.site import Anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.formats.seats import Seat, seats_of


def loras_of(model: nn.Module, weights: Weights, library: str, kinds: Sequence[type]) -> list[Seat]:
    """Return the seats of weights that are LoRAs of some kinds alone; raises `DeltaTuneError` for everything else."""
    seats = seats_of(model, weights)
    seen = set()
    for seat in seats:
        method, site = seat.method, seat.site
        if type(method) not in kinds:
            names = " and ".join(kind.__name__ for kind in kinds)
            raise DeltaTuneError(
                f"{library}'s files hold {names}, and this delta has {method}; write it as another format."
            )
        if site.kind != "linear" or site.tensor is not None:
            raise DeltaTuneError(
                f"{library}'s files hold LoRAs of linear layers; {site.path!r} is of the kind {site.kind!r}, where this delta has {method}."
            )
        if (site.path, site.part) in seen:
            raise DeltaTuneError(f"{library} has one LoRA at a module; this delta has several at {site.address!r}.")
        seen.add((site.path, site.part))
    if weights.fixed or any(len(seat.unfolded["A"]) != seat.method.rank for seat in seats):
        raise DeltaTuneError(
            f"{library}'s files have the trained factors alone, and {weights.delta} has others that are fixed; write it as peft."
        )
    return seats


def one(library: str, what: str, values: Collection[Any]) -> Any:
    """Return the value that all of a delta's terms have; raises `DeltaTuneError` when they differ."""
    different = sorted(set(values), key=str)
    if len(different) != 1:
        said = ", ".join(str(value) for value in different)
        raise DeltaTuneError(f"{library}'s files have one {what} for all modules; this delta has {said}.")
    return different[0]


def by_role(
    parts: Anatomy, seats: Sequence[Seat], library: str, roles: Collection[str]
) -> dict[tuple[str, int | None], Seat]:
    """Return seats by role and block; raises `DeltaTuneError` for places that the library cannot name or choose.

    The library has modules by role in every block, and those of the feed-forward layer all or none.
    """
    if len(parts.stacks) != 1:
        raise DeltaTuneError(f"{library} has models of one stack; {parts.family} has {len(parts.stacks)}.")
    found: dict[tuple[str, int | None], Seat] = {}
    for seat in seats:
        site = seat.site
        named = [
            p for p in parts.places if (p.path, p.part, p.exit) == (site.path, site.part, None) and p.role in roles
        ]
        if not named:
            raise DeltaTuneError(
                f"{library} has no name for {site.address!r}, where this delta has {seat.method}; it has {', '.join(sorted(roles))}."
            )
        found[named[0].role, named[0].layer] = seat
    chosen = {role for role, _ in found}
    for place in parts.places:
        wanted = place.role in chosen or (place.role.startswith("ffn.") and any(r.startswith("ffn.") for r in chosen))
        if wanted and place.role in roles and (place.role, place.layer) not in found:
            raise DeltaTuneError(
                f"{library} chooses modules for all blocks alike, and those of the feed-forward layer together; this delta "
                f"has nothing at {place.path!r} ({place.role}). Write it as peft."
            )
    return found
