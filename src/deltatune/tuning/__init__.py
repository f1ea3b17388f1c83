"""Tuning one run: recipe, token batches, loop, checkpoints, evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltatune.tuning.recipe import Recipe, Run

if TYPE_CHECKING:
    from deltatune.tuning.loop import NonFiniteLoss
    from deltatune.tuning.many import tune_many
    from deltatune.tuning.run import tune
    from deltatune.tuning.use import evaluate, predict

__all__ = ["NonFiniteLoss", "Recipe", "Run", "evaluate", "predict", "tune", "tune_many"]

# Loaded when first asked for, so that reading a recipe does not load torch and transformers.
_HOMES = {"tune": "run", "tune_many": "many", "evaluate": "use", "predict": "use", "NonFiniteLoss": "loop"}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"deltatune.tuning.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
