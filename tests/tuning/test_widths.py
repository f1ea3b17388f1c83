"""Widths: the best of all choices, and batches that are filled up to them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from deltatune.tuning.encode import IGNORED, Row, collate, epoch_order
from deltatune.tuning.widths import EXACT, INPUTS, LABELS, Widths, few


def filled(sizes: list[int], widths: tuple[int, ...]) -> int:
    return sum(next(width for width in widths if width >= size) for size in sizes)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_of_as_many_widths_fills_less(seed: int) -> None:
    draw = random.Random(seed)
    sizes, count = [draw.randint(1, 12) for _ in range(draw.randint(1, 15))], draw.randint(1, 4)
    chosen, (*others, largest) = few(sizes, count), sorted(set(sizes))
    choices = itertools.combinations(others, min(count - 1, len(others)))
    assert len(chosen) <= count and list(chosen) == sorted(set(chosen))
    assert filled(sizes, chosen) == min(filled(sizes, (*choice, largest)) for choice in choices)


def rows(causal: bool) -> list[Row]:
    draw = random.Random(0)
    made = []
    for _ in range(300):
        prompt, target = (tuple(range(5, 5 + draw.randint(1, top))) for top in (60, 20))
        made.append(Row(prompt + target, (IGNORED,) * len(prompt) + target) if causal else Row(prompt, target))
    return made


@pytest.mark.parametrize("causal", [True, False])
def test_all_batches_of_a_run_have_few_shapes_and_the_same_tokens(causal: bool) -> None:
    own = rows(causal)
    first, later = (epoch_order([row.tokens for row in own], 4, seed=0, epoch=epoch) for epoch in (0, 1))
    widths = Widths.of(own, first)
    shapes = set()
    for group in first + later:
        batch, tight = (collate([own[index] for index in group], 0, widths=w) for w in (widths, EXACT))
        shapes.add((batch["input_ids"].shape, batch["labels"].shape))
        for name, fill in {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}.items():
            width = tight[name].shape[1]
            assert torch.equal(batch[name][:, :width], tight[name])
            assert (batch[name][:, width:] == fill).all()
    assert len({inputs for inputs, _ in shapes}) <= INPUTS
    assert len({labels for _, labels in shapes}) <= (INPUTS if causal else LABELS)


def test_a_row_beyond_all_widths_is_not_cut() -> None:
    batch = collate([Row((1,) * 9, (2,) * 3)], 0, widths=Widths((4, 6), (2,)))
    assert batch["input_ids"].shape == (1, 9) and batch["labels"].shape == (1, 3)
