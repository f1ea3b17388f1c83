"""Widths: the few sizes to which the batches of a run are filled up, where every shape that occurs has a price.

    min sum_i (w(s_i) - s_i)        w(s) the least of at most k chosen widths that is no less than s

On a CPU a matrix product in bfloat16 is compiled for each shape, which takes time, and memory that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from deltatune.tuning.encode import Row

INPUTS, LABELS = 8, 4  # how many widths inputs may have, and labels that a decoder reads


@dataclass(frozen=True)
class Widths:
    """The widths of inputs and of labels, ascending; without any, a batch is as wide as its longest row.

    `tokens` are the numbers of tokens, padding left out, that a batch's inputs are filled up to where padding is.
    """

    inputs: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()

    @staticmethod
    def of(rows: Sequence[Row], groups: Sequence[Sequence[int]]) -> Widths:
        """Choose widths for an epoch's batches of indices, and others like them; labels along the inputs have the inputs'."""
        inputs = [max(len(rows[index].input) for index in group) for group in groups]
        labels = [max(len(rows[index].labels) for index in group) for group in groups]
        tokens = [sum(len(rows[index].input) for index in group) for group in groups]
        chosen = few(inputs, INPUTS)
        return Widths(chosen, chosen if inputs == labels else few(labels, LABELS), few(tokens, INPUTS))


EXACT = Widths()


def wide(longest: int, widths: Sequence[int]) -> int:
    """Return the width of a batch whose longest row is that long: the next of the widths where they go so far."""
    return next((width for width in widths if width >= longest), longest)


def few(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Return at most `count` of the sizes, ascending, such that filling each size up to the next of them adds least."""
    each, times = np.unique(sizes, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(times)])
    # filled[i, j]: what sizes i to j come to at the width of the j-th; total[j]: the least for all up to the j-th
    filled = np.where(np.tri(len(each), dtype=bool).T, each * (upto[1:] - upto[:-1, None]), np.inf)
    total, starts = filled[0], [np.zeros(len(each), int)]
    for _ in range(min(count, len(each)) - 1):
        options = np.concatenate([[0], total[:-1]])[:, None] + filled
        starts.append(options.argmin(0))
        total = options.min(0)
    chosen, last = [], len(each) - 1
    while last >= 0:
        chosen.append(int(each[last]))
        last = int(starts.pop()[last]) - 1
    return tuple(reversed(chosen))
