"""ReFT for the writers of libraries that have one intervention for both ends of a text, or one for each."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from deltatune.core.method import Method
from deltatune.errors import DeltaTuneError
from deltatune.formats.seats import Seat
from deltatune.methods.combine.at_positions import AtPositions


def refts_of(seats: Sequence[Seat], library: str, kinds: Collection[type[Method]], but: str = "") -> list[AtPositions]:
    """Return the methods of seats that are ReFTs: one for both ends of a text, or that of the first positions and that of the last.

    In whichever order a delta has them. Raises `DeltaTuneError`, to which `but` adds a reason, for everything else.
    """
    methods: list[AtPositions] = []
    for method in dict.fromkeys(seat.method for seat in seats):
        if not isinstance(method, AtPositions) or type(method.inner) not in kinds:
            names = ", ".join(kind.__name__ for kind in kinds)
            raise DeltaTuneError(
                f"{library} has {names} at the first and last positions{but}; this delta has {method}: write for example "
                "AtPositions(LoReFT(), first=4)."
            )
        methods.append(method)
    methods.sort(key=lambda method: method.last)
    at = [sorted(seat.site.path for seat in seats if seat.method == method) for method in methods]
    ends = len(methods) == 2 and methods[0].last == 0 == methods[1].first and at[0] == at[1]
    if not (len(methods) == 1 or ends) or len({type(method.inner) for method in methods}) > 1:
        raise DeltaTuneError(
            f"{library} has one kind of ReFT, with one intervention for both ends of a text or one for each, behind the same "
            f"blocks; this delta has {' + '.join(map(str, methods))}."
        )
    if any(len(set(paths)) < len(paths) for paths in at):
        raise DeltaTuneError(f"{library} has one intervention at a place; this delta has the same one twice.")
    return methods
