"""Scores of predictions in percent, by the well-kept libraries of the field."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from deltatune.errors import DeltaTuneError, nearest
from deltatune.tasks.example import Example

Predictions = Sequence[str]
# The F1 of a label that is never predicted; the library gives this argument no type that allows a number.
_ZERO: Any = 0
Examples = Sequence[Example]


def score(metric: str, predictions: Predictions, examples: Examples) -> float:
    """Return the score of predictions, in percent: 100 is perfect, and only a correlation can be below 0.

    `accuracy`, `macro-f1` (mean over the labels that occur as targets) and `matthews` compare with `target`, blind to
    case and outer spaces; `pearson` correlates numbers; `exact-match` and `qa-f1` (SQuAD normalisation) and `rougeL`
    take the best of `references`. Raises `DeltaTuneError` on an unknown metric, no examples, or unequal lengths.
    """
    if metric not in METRICS:
        raise DeltaTuneError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}.{nearest(metric, METRICS)}")
    if len(predictions) != len(examples):
        raise DeltaTuneError(f"{len(predictions)} predictions for {len(examples)} examples; give one for each.")
    if not examples:
        raise DeltaTuneError(f"{metric} of no examples is not defined; give at least one.")
    return 100.0 * METRICS[metric](predictions, examples)


def _labels(texts: Sequence[str]) -> list[str]:
    return [text.strip().lower() for text in texts]


def _gold(examples: Examples) -> list[str]:
    return _labels([example.target for example in examples])


def _accuracy(predictions: Predictions, examples: Examples) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(_gold(examples), _labels(predictions)))


def _macro_f1(predictions: Predictions, examples: Examples) -> float:
    from sklearn.metrics import f1_score

    gold = _gold(examples)
    return float(f1_score(gold, _labels(predictions), labels=sorted(set(gold)), average="macro", zero_division=_ZERO))


def _matthews(predictions: Predictions, examples: Examples) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(_gold(examples), _labels(predictions)))


def _number(text: str) -> float | None:
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _pearson(predictions: Predictions, examples: Examples) -> float:
    """Correlate numbers; a prediction that is no number counts as the middle of the targets' range.

    Leaving such predictions out would reward silence on hard examples; the middle is the blandest guess there is.
    Constant predictions or targets have no correlation and score 0.
    """
    from scipy.stats import pearsonr

    gold: list[float] = []
    for example in examples:
        value = _number(example.target)
        if value is None:
            raise DeltaTuneError(f"pearson needs numbers as targets; example {example.id!r} has {example.target!r}.")
        gold.append(value)
    middle = (min(gold) + max(gold)) / 2
    values = [_number(text) for text in predictions]
    numbers = [middle if value is None else value for value in values]
    if len(set(gold)) == 1 or len(set(numbers)) == 1:
        return 0.0
    result: Any = pearsonr(numbers, gold)
    return float(result.statistic)


def _squad(predictions: Predictions, examples: Examples, key: str) -> float:
    from torchmetrics.functional.text import squad

    answers = [
        {"answers": {"answer_start": [0] * len(example.references), "text": list(example.references)}, "id": str(row)}
        for row, example in enumerate(examples)
    ]
    texts = [{"prediction_text": text, "id": str(row)} for row, text in enumerate(predictions)]
    return float(squad(texts, answers)[key]) / 100


def _exact_match(predictions: Predictions, examples: Examples) -> float:
    return _squad(predictions, examples, "exact_match")


def _qa_f1(predictions: Predictions, examples: Examples) -> float:
    return _squad(predictions, examples, "f1")


def _rouge_l(predictions: Predictions, examples: Examples) -> float:
    from torchmetrics.functional.text.rouge import rouge_score

    references = [list(example.references) for example in examples]
    scores = rouge_score(list(predictions), references, accumulate="best", rouge_keys="rougeL")
    return float(scores["rougeL_fmeasure"])


METRICS: dict[str, Callable[[Predictions, Examples], float]] = {
    "accuracy": _accuracy,
    "macro-f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "exact-match": _exact_match,
    "qa-f1": _qa_f1,
    "rougeL": _rouge_l,
}
