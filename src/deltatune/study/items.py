"""The test score of every single item, on which methods are compared item by item."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

# These are no means over items; what an item contributes to them is whether it is right.
RIGHT_OR_WRONG = ("accuracy", "macro-f1", "matthews")


def item_scores(metric: str, predictions: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
    """A digest of the items and their scores in whole percent, in the order of their ids; empty where none is defined.

    `predictions` are the rows of predictions.jsonl: `id`, `prediction`, `target`, and `references` where they differ.
    """
    if metric == "pearson" or not predictions:
        return "", []
    rows = sorted(predictions, key=lambda row: row["id"])
    digest = hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()[:12]
    return digest, [round(_score(metric, row)) for row in rows]


def _score(metric: str, row: Mapping[str, Any]) -> float:
    if metric in RIGHT_OR_WRONG:
        return 100.0 * (_plain(row["prediction"]) == _plain(row["target"]))
    from deltatune.tasks import Example, score

    references = tuple(row.get("references") or (row["target"],))
    return score(metric, [row["prediction"]], [Example(row["id"], "", row["target"], references)])


def _plain(text: str) -> str:
    return text.strip().lower()
