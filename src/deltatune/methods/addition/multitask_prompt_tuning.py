"""Multitask prompt tuning: one prompt for all tasks, times a low-rank matrix of each (Wang et al., 2023, arXiv:2303.02861).

    X' = [P * (u_k v_k^T); X]        P: [length, d]   u_k: [length, rank]   v_k: [d, rank], * element by element

for the task k. P starts as rows of the vocabulary and u, v N(0, 0.02^2), as in the authors' code. `task` says whose
prompt acts: the weights of one task are those of another with `task` changed, which `of_task` does. Parameters: length d
+ tasks rank (length + d).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from deltatune.core.delta import Delta
from deltatune.core.leaf import Init, Leaf, Normal
from deltatune.core.method import Method, OnTokens
from deltatune.core.site import Site
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.methods._prompts import Vocabulary
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class MultitaskPromptTuning(OnTokens):
    """Shared prompt: X' = [P * (u_k v_k^T); X] for the task k (Wang et al., 2023)."""

    length: int = 100
    tasks: int = 1
    task: int = 0
    rank: int = 1
    init: Init = Vocabulary()
    factors: Init = Normal(0.02)

    where = "input.embed"
    breaks = {**OnTokens.breaks, "identity": "tokens in front of the text take attention from the first step on"}  # noqa: RUF012

    def __post_init__(self) -> None:
        check_least(self, length=self.length, tasks=self.tasks, rank=self.rank)
        if not 0 <= self.task < self.tasks:
            raise DeltaTuneError(
                f"MultitaskPromptTuning(tasks={self.tasks}) has no task {self.task}; write one of 0 to {self.tasks - 1}."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {
            "P": Leaf((self.length, site.d_out), self.init),
            "u": Leaf((self.tasks, self.length, self.rank), self.factors),
            "v": Leaf((self.tasks, site.d_out, self.rank), self.factors),
        }

    def tokens(self, p: Any) -> Tensor:
        return p.P * (p.u[self.task] @ p.v[self.task].mT)


def of_task(weights: Weights, task: int) -> Weights:
    """Return weights whose methods have tasks as those of another task: the same numbers, read for `task`.

    Raises `DeltaTuneError` when no method in them has tasks.
    """
    if not any("task" in vars(term.method) for term in weights.delta.terms):
        raise DeltaTuneError(f"no method of {weights.delta} has tasks.")
    return replace(weights, delta=Delta(tuple(replace(t, method=_read(t.method, task)) for t in weights.delta.terms)))


def _read(method: Any, task: int) -> Method:
    return replace(method, task=task) if "task" in vars(method) else method
