"""The objectives: what goes in and what is asked for together are the text, token for token."""

from __future__ import annotations

import numpy as np
import torch

from deltatune.backbones.pretrain.objectives import NextToken, SpanCorruption

SENTINELS = tuple(range(3, 35))
EOS = 2


def span(prefix_share: float = 0.0, window: int = 64) -> SpanCorruption:
    return SpanCorruption(window, 0.15, 3.0, prefix_share, 20, SENTINELS, EOS)


def windows(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(40, 400, size=(rows, length))


def restore(source: list[int], target: list[int]) -> list[int]:
    """Put the target's spans back in the place of their sentinels."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    return [token for given in source for token in (spans[given] if given in SENTINELS else [given])]


def test_next_token_rows_begin_with_bos_and_lose_nothing() -> None:
    text = windows(3, 15)
    batch = NextToken(context=16, bos=1).batch(text, np.random.default_rng(0))
    assert batch["input_ids"].shape == (3, 16) and batch["input_ids"].dtype == torch.int64
    assert (batch["input_ids"][:, 0] == 1).all()
    assert np.array_equal(batch["labels"][:, 1:].numpy(), text)


def test_span_corruption_can_be_undone() -> None:
    text = windows(20, 64)
    batch = span().batch(text, np.random.default_rng(1))
    for source, target, row in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), text.tolist(), strict=True):
        assert source.pop() == EOS and target.pop() == EOS
        assert restore(source, target) == row


def test_span_corruption_has_the_noise_it_was_asked_for() -> None:
    batch = span().batch(windows(4, 64), np.random.default_rng(2))
    noisy, spans = 10, 3
    assert batch["input_ids"].shape == (4, 64 - noisy + spans + 1)
    assert batch["labels"].shape == (4, noisy + spans + 1)


def test_spans_differ_between_rows_and_reach_every_position() -> None:
    same = np.tile(np.arange(40, 104), (400, 1))
    batch = span().batch(same, np.random.default_rng(3))
    cut = [token for row in batch["labels"].tolist() for token in row if token >= 40]
    counts = np.bincount(cut, minlength=104)[40:]
    assert (counts[1:] > 0).all()
    assert counts.sum() == 400 * 10


def test_prefix_batches_split_the_window() -> None:
    text = windows(5, 64)
    batch = span(prefix_share=1.0).batch(text, np.random.default_rng(4))
    assert batch["input_ids"].shape == (5, 21) and batch["labels"].shape == (5, 45)
    assert np.array_equal(torch.cat([batch["input_ids"][:, :-1], batch["labels"][:, :-1]], dim=1).numpy(), text)


def test_prefix_share_is_the_share_of_batches() -> None:
    objective, rng = span(prefix_share=0.5), np.random.default_rng(5)
    lengths = [objective.batch(windows(1, 64), rng)["input_ids"].shape[1] for _ in range(400)]
    assert 0.4 < lengths.count(21) / 400 < 0.6


def test_short_windows_still_work() -> None:
    source, target = span(window=2).corrupt(np.array([50, 60]), np.random.default_rng(6))
    assert restore(source.tolist(), target.tolist()) == [50, 60]
