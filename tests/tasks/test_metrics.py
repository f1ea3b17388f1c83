"""Metrics against values worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from deltatune.errors import DeltaTuneError
from deltatune.tasks import METRICS, Example, score, task


def examples(*targets: str) -> list[Example]:
    return [Example(str(n), "i", target, (target,)) for n, target in enumerate(targets)]


def referenced(*references: Sequence[str]) -> list[Example]:
    return [Example(str(n), "i", texts[0], tuple(texts)) for n, texts in enumerate(references)]


GOLD = examples("a", "a", "a", "b")

CASES = [
    ("accuracy", ["a", "a", "b", "b"], GOLD, 75.0),
    ("accuracy", [" A ", "a", "A", "c"], GOLD, 75.0),
    # a: precision 1, recall 2/3, F1 0.8; b: precision 1/2, recall 1, F1 2/3.
    ("macro-f1", ["a", "a", "b", "b"], GOLD, 100 * (0.8 + 2 / 3) / 2),
    # A prediction outside the labels lowers recall and is no label of its own: a 1, b 0.
    ("macro-f1", ["a", "a", "a", "zebra"], GOLD, 50.0),
    # tp 1, tn 2, fp 1, fn 0 for b: (1*2 - 0) / sqrt(2 * 1 * 3 * 2).
    ("matthews", ["a", "a", "b", "b"], GOLD, 100 * 2 / 12**0.5),
    ("matthews", ["b", "b", "b", "a"], GOLD, -100.0),
    ("matthews", ["a", "a", "a", "a"], GOLD, 0.0),
    ("pearson", ["2", "4", "6"], examples("1", "2", "3"), 100.0),
    ("pearson", ["3", "2", "1"], examples("1", "2", "3"), -100.0),
    ("pearson", ["2.5", "2.5", "2.5"], examples("1", "2", "3"), 0.0),
    # What is no number counts as the middle, 3: 1, 3, 5 against 1, 2, 5, so 8 / sqrt(8 * 26 / 3).
    ("pearson", ["1", "many", "5"], examples("1", "2", "5"), 100 * 8 / (8 * 26 / 3) ** 0.5),
    ("pearson", ["1", "nan", "5"], examples("1", "2", "5"), 100 * 8 / (8 * 26 / 3) ** 0.5),
    ("exact-match", ["The Cat!", "dog"], referenced(["a dog", "cat"], ["a dogs"]), 50.0),
    # "cat sat" against "cat sat down": precision 1, recall 2/3; the best reference counts.
    ("qa-f1", ["the cat sat"], referenced(["bird", "cat sat down"]), 80.0),
    ("qa-f1", [""], referenced(["bird"]), 0.0),
    # Longest common subsequence "the mat" of 2 words against 3 and 4: precision 2/3, recall 2/4.
    ("rougeL", ["the red mat"], referenced(["on the big mat"]), 100 * 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2)),
    ("rougeL", ["The mat."], referenced(["something else", "the mat"]), 100.0),
    ("rougeL", ["", "the mat"], referenced(["a"], ["the mat"]), 50.0),
]


@pytest.mark.parametrize(("metric", "predictions", "gold", "expected"), CASES)
def test_hand_written_cases(metric: str, predictions: list[str], gold: list[Example], expected: float) -> None:
    assert score(metric, predictions, gold) == pytest.approx(expected, abs=1e-4)


def test_every_metric_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(METRICS)


@pytest.mark.parametrize("metric", ["accuracy", "macro-f1", "matthews", "exact-match", "qa-f1", "rougeL"])
def test_the_targets_themselves_score_100(metric: str) -> None:
    gold = task("sentiment").split("dev")
    assert score(metric, [example.target for example in gold], gold) == pytest.approx(100.0)


def test_mistakes_are_named() -> None:
    with pytest.raises(DeltaTuneError, match=r"unknown metric 'acuracy'.*Did you mean 'accuracy'"):
        score("acuracy", ["a"], examples("a"))
    with pytest.raises(DeltaTuneError, match="1 predictions for 2 examples"):
        score("accuracy", ["a"], examples("a", "b"))
    with pytest.raises(DeltaTuneError, match="no examples"):
        score("rougeL", [], [])
    with pytest.raises(DeltaTuneError, match="example '1' has 'two'"):
        score("pearson", ["1", "2"], examples("1", "two"))
