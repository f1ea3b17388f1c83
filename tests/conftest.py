"""Fixtures shared by all tests: where the real data and models are, and a quiet, deterministic torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared"


def _folder(variable: str, name: str) -> Path:
    folder = Path(os.environ.get(variable, BESIDE / name))
    if not folder.is_dir():
        pytest.skip(f"needs the real {name}: set {variable} to their folder")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tasks (`tasks.json`, `tasks/*.jsonl.gz`)."""
    return _folder("DELTATUNE_DATA", "data")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of small real pre-trained models."""
    return _folder("DELTATUNE_MODELS", "models")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
