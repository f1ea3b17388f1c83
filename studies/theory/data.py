"""Batches of a task, as its runs read them."""

from __future__ import annotations

import random

from torch import Tensor

from deltatune.tasks import Example, Task, task
from deltatune.tuning.answers import make_rows
from deltatune.tuning.encode import Codec, collate
from studies.theory.state import State

Batches = list[dict[str, Tensor]]


def codec_of(state: State) -> Codec:
    """Return the tokenizer with the recipe's limits."""
    return Codec(state.backbone, state.plan.recipe.max_input, state.plan.recipe.max_target)


def batches_of(state: State, subject: Task, examples: list[Example]) -> Batches:
    """Return examples as batches with labels."""
    codec, size = codec_of(state), state.plan.recipe.batch
    rows = make_rows(codec, subject, examples)
    return [collate(rows[first : first + size], codec.pad) for first in range(0, len(rows), size)]


def examples_of(state: State, name: str, split: str, count: int, seed: int) -> Batches:
    """Return `count` random examples of a split as batches."""
    subject = task(name)
    every = subject.split(split)
    return batches_of(state, subject, random.Random(seed).sample(every, min(count, len(every))))
