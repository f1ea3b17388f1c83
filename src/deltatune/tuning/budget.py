"""A memory budget: the fewest blocks recomputed that keep the planned peak under it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from deltatune.errors import DeltaTuneError
from deltatune.tuning.recipe import Recipe

if TYPE_CHECKING:
    from deltatune.tuning.ledger import Ledger


def plannable(recipe: Recipe, budget: int | None) -> bool:
    """Whether a run can be planned; raises `DeltaTuneError` where it cannot and has a budget, in bytes."""
    if recipe.compiler == "none":
        return True
    if budget:
        raise DeltaTuneError(
            f"a memory budget cannot be kept with compiler {recipe.compiler!r}, which decides by itself what to keep and what to "
            "recompute. Write compiler = 'none', or no budget."
        )
    return False


def within(budget: int, planned: Callable[[Sequence[str]], Ledger]) -> Ledger:
    """Return the ledger with the fewest blocks recomputed whose peak is at most `budget` bytes; 0 asks for no limit.

    `planned` makes a ledger for the paths of recomputed blocks. Those that keep the most go first, of equal ones the
    lower: when the backward pass comes to them, what is above is freed. Raises `DeltaTuneError`, saying the least
    that can be reached, when the budget is too small.
    """
    plain = planned(())
    if not budget or plain.peak <= budget:
        return plain
    heavy = [path for path, kept in sorted(plain.blocks, key=lambda block: -block[1]) if kept]
    least, most = planned(heavy), len(heavy)
    while most > 1 and (fewer := planned(heavy[: most - 1])).peak <= least.peak:  # the last ones may only cost
        least, most = fewer, most - 1
    if least.peak > budget:
        raise DeltaTuneError(
            f"a memory budget of {_mebibytes(budget)} cannot be kept: {_mebibytes(least.peak)} is the least that can be "
            f"reached, with {most} of {len(plain.blocks)} blocks recomputed, and {_mebibytes(plain.peak)} is needed with "
            "none. Write a larger budget, a smaller batch or shorter inputs."
        )
    found, low = least, 1
    while low < most:
        middle = (low + most) // 2
        tried = planned(heavy[:middle])
        if tried.peak <= budget:
            found, most = tried, middle
        else:
            low = middle + 1
    return found


def beside(ledger: Ledger, resident: int) -> Ledger:
    """Return the ledger of a process that has `resident` bytes before the first step, backbone and delta among them."""
    return replace(ledger, process=max(resident - ledger.backbone - ledger.delta, 0))


def _mebibytes(bytes: int) -> str:
    return f"{bytes / 2**20:,.0f} MiB"
