"""Doing runs of a study in groups that train together in one pass over their backbone; what is left goes the usual way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from deltatune.errors import DeltaTuneError
from deltatune.study.plan import Plan
from deltatune.study.store import Store

if TYPE_CHECKING:
    from deltatune.tuning import Run


def run_groups(plan: Plan, store: Store, size: int, say: Callable[[str], None]) -> None:
    """Train up to `size` runs at a time that share backbone and precision, until no two such runs are pending.

    Search runs come first, since final runs depend on them. A group that cannot be built is left to be done run by run.
    """
    alone: set[Run] = set()
    while len(group := _next(plan, store, size, alone)) > 1:
        with ExitStack() as claims:
            mine = [
                run for run in group if claims.enter_context(store.claim(run.id)) and not store.find(run.id).settled
            ]
            for run in mine:
                store.begin(run)
            say(f"training {len(mine)} runs together on {group[0].backbone}")
            alone |= set(group) - _train(mine, store, say)


def _train(runs: list[Run], store: Store, say: Callable[[str], None]) -> set[Run]:
    """Train a group and return the runs that are over, done or failed."""
    from deltatune.tuning import tune_many

    try:
        tune_many(runs, [store.run_folder(run.id) for run in runs])
    except DeltaTuneError as error:
        say(str(error))
    return {run for run in runs if store.find(run.id).settled}


def _next(plan: Plan, store: Store, size: int, alone: set[Run]) -> list[Run]:
    entries = plan.runs(store.dev_scores(plan))
    pending = [e.run for e in entries if e.run not in alone and store.state(e.run.id) == "pending"]
    together = [run for run in dict.fromkeys(pending) if not run.recipe.dropout]
    alike = [run for run in together if _kind(run) == _kind(together[0])]
    return alike[:size]


def _kind(run: Run) -> tuple[str, str]:
    return run.backbone, run.recipe.precision
