"""A folder of made-up texts and settings so small that a whole run takes seconds."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltatune.backbones.pretrain import Settings, parse_settings

WORDS = ["a", "the", "cat", "dog", "sat", "ran", "on", "over", "mat", "hill", "and", "then", "7", "12", "red"]

BASE: dict[str, Any] = {
    "name": "tiny",
    "tokenizer": {"size": 360},
    "model": {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 48, "context": 24},
    "train": {
        "steps": 24,
        "batch": 4,
        "warmup": 4,
        "log_every": 2,
        "checkpoint_every": 4,
        "validation_every": 8,
        "validation_rows": 8,
        "held_out": 0.1,
    },
}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts of 60 documents."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for name in ("stories", "notes"):
        documents = [" ".join(rng.choices(WORDS, k=40)) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Settings]:
    """Settings of a tiny run; keyword arguments replace keys of its tables."""

    def make(**tables: dict[str, Any]) -> Settings:
        content = copy.deepcopy(BASE)
        for table, values in tables.items():
            content[table] = content.get(table, {}) | values
        return parse_settings(content)

    return make
