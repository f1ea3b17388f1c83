"""Where a sub-layer begins and ends when no single module is the whole of it.

BERT's attention module leaves its output projection to a sibling; OPT, BART and BERT have no module for the feed-forward
at all. There the sub-layer is a span: from the input of one module to the output of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from deltatune.core.site import Place

Key = tuple[str, int | None]


def with_spans(places: tuple[Place, ...]) -> tuple[Place, ...]:
    """Return the places with an `exit` for each attention whose projection lies outside it, and a span for each missing `ffn`."""
    by_role: dict[str, dict[Key, Place]] = {}
    for place in places:
        by_role.setdefault(place.role, {}).setdefault((place.stack, place.layer), place)
    return (*(_ended(place, by_role) for place in places), *_feed_forwards(by_role))


def _ended(place: Place, by_role: dict[str, dict[Key, Place]]) -> Place:
    last = by_role.get(f"{place.role}.o", {}).get((place.stack, place.layer))
    if place.role not in ("attn", "cross") or last is None or last.path.startswith(f"{place.path}."):
        return place
    return replace(place, exit=last.path)


def _feed_forwards(by_role: dict[str, dict[Key, Place]]) -> Iterator[Place]:
    downs, gates = by_role.get("ffn.down", {}), by_role.get("ffn.gate", {})
    for key, up in by_role.get("ffn.up", {}).items():
        if key in downs and key not in by_role.get("ffn", {}):
            yield Place("ffn", gates.get(key, up).path, up.stack, up.layer, exit=downs[key].path)
