"""`gap`: how far two deltas, or a delta and its backbone, are apart: in answers, in hidden states, and along the way between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from deltatune.errors import DeltaTuneError
from deltatune.theory.bound import POINTS, SegmentBound, bound_between
from deltatune.theory.exhibit import Exhibit, Lines, Table, by_place
from deltatune.theory.function_gap import FunctionGap, compare_answers
from deltatune.theory.landscape import as_values
from deltatune.theory.similarity import Similarity, compare_states
from deltatune.theory.subject import Subject

Found = TypeVar("Found")


def gap(subject: Subject, where: str | None = None, points: int = POINTS) -> Exhibit:
    """Compare the first delta (the reference) with the second; a single one is compared with the backbone as it is.

    CKA, at `where` or else at every block, is left out for deltas that lengthen the input, and gap <= L |eps| for those
    that are no change of weights.
    """
    model, batches, notes = subject.model, subject.batches, []
    sides = [*subject.deltas.values()]
    a, b = sides if len(sides) == 2 else (None, sides[0])
    apart = compare_answers(model, a, b, batches)
    if where is None:
        states = _possible(lambda: compare_states(model, a, b, batches), "CKA", notes)
    else:
        states = compare_states(model, a, b, batches, where)
    bound = _possible(lambda: bound_between(model, *as_values(model, a, b), batches, points=points), "the bound", notes)
    cka = {} if states is None else states.cka if where else _by_layer(subject, states)
    charts: list[Lines] = [by_place("Similarity of the hidden states", "linear CKA", {"CKA": cka})] if cka else []
    return Exhibit(
        "gap",
        {
            "Between": " and ".join(subject.deltas) if a else f"the backbone and {next(iter(subject.deltas))}",
            **subject.about,
            **subject.data,
        },
        [found for found in (apart, states, bound) if found is not None],
        [_numbers(apart, bound), *([_states(states, cka)] if states else [])],
        charts + ([_segment(bound)] if bound else []),
        {"CKA with the backbone as it is": cka} if a is None and cka else {},
        notes,
    )


def _possible(measure: Callable[[], Found], what: str, notes: list[str]) -> Found | None:
    """Return a measurement, or note why it cannot be made."""
    try:
        return measure()
    except DeltaTuneError as error:
        notes.append(f"{what} is left out: {error}")
        return None


def _by_layer(subject: Subject, states: Similarity) -> dict[str, float]:
    return {subject.layer(address): value for address, value in states.cka.items()}


def _numbers(apart: FunctionGap, bound: SegmentBound | None) -> Table:
    rows = [
        ("KL divergence of the answers, nats", apart.kl),
        ("its standard error", apart.kl_error),
        ("mean squared difference of scores", apart.mse),
        ("equal first choices, %", 100 * apart.agreement),
        ("positions", apart.positions),
    ]
    if bound:
        rows += [
            ("|eps|, the distance of the weights", bound.distance),
            ("gap of the losses", bound.gap),
            ("L |eps|, its bound", bound.bound),
            ("largest slope on the way", bound.tight),
        ]
    return Table("How far apart", ("quantity", "value"), tuple(rows))


def _states(states: Similarity, cka: Mapping[str, float]) -> Table:
    return Table(f"Hidden states over {states.tokens:,} tokens", ("layer", "linear CKA"), tuple(cka.items()))


def _segment(bound: SegmentBound) -> Lines:
    series = {"loss": list(zip(bound.at, bound.losses, strict=True))}
    return Lines("The loss on the way between the weights", "t", "loss", series)
