"""Small task folders, written by the tests that read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., Path]


def record(number: int, split: str = "train", **fields: Any) -> dict[str, Any]:
    """A good record of a two-label task."""
    target = ("no", "yes")[number % 2]
    whole = {"id": f"{split}/{number}", "split": split, "input": f"text {number}", "target": target}
    return {**whole, "references": [target], **fields}


@pytest.fixture
def write_task(tmp_path: Path) -> Write:
    """Write `toy.jsonl` of lines (records, or raw text) with an index entry; return the folder."""

    def write(lines: Iterable[Any], **entry: Any) -> Path:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "toy.jsonl").write_text(text, encoding="utf-8")
        whole = {"name": "toy", "kind": "classification", "labels": ["no", "yes"], "metric": "accuracy"}
        whole |= {"file": "toy.jsonl", **entry}
        (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [whole]}), encoding="utf-8")
        return tmp_path

    return write
