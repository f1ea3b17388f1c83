"""Runs trained together in one pass end as each does alone, continue after a crash, and fail alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltatune as dt
from deltatune.tuning import Recipe, Run, tune, tune_many
from deltatune.tuning.loop import Loop
from deltatune.tuning.run import Session
from tests.tuning.training import write_backbone, write_task

RECIPE = Recipe(steps=12, batch=4, lr=1e-2, eval_every=4, checkpoint_every=3, max_input=24, max_target=4, dev_limit=6)
DELTAS = ("LoRA(rank=2)", "LoRA(rank=2)", "Adapter(size=4)", "PrefixTuning(length=3)", "AdaLoRA(rank=2)", "BitFit()")


def runs(tmp_path: Path, kind: str) -> list[Run]:
    """Unlike methods, seeds, learning rates, batch sizes and lengths."""
    backbone = write_backbone(tmp_path / "backbone", kind)
    tasks = [write_task(tmp_path / "one", "one"), write_task(tmp_path / "two", "two", generation=kind != "masked")]
    recipes = [RECIPE, Recipe(**{**RECIPE.to_json(), "lr": 3e-3, "batch": 3, "steps": 9, "optimizer": "sgd"})]
    return [Run(delta, backbone, tasks[i % 2], recipes[i % 2], seed=i) for i, delta in enumerate(DELTAS)]


def precise(load: Callable[[Run], Any]) -> Callable[[Run], Any]:
    """Load backbones in float64, so that rounding, which AdamW blows up where gradients are almost zero, is no excuse."""

    def loaded(run: Run) -> Any:
        backbone = load(run)
        backbone.model.double()
        return backbone

    return loaded


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "masked"])
def test_runs_trained_together_end_as_each_does_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "load", staticmethod(precise(Session.load)))
    wanted = runs(tmp_path, kind)
    alone = [tune(run, tmp_path / f"alone{i}") for i, run in enumerate(wanted)]
    together = tune_many(wanted, [tmp_path / f"together{i}" for i in range(len(wanted))])
    for i, (one, many) in enumerate(zip(alone, together, strict=True)):
        assert many["run"] == one["run"] and many["steps"] == one["steps"] and many["tokens"] == one["tokens"]
        assert many["parameters"] == one["parameters"] and many["backbone_parameters"] == one["backbone_parameters"]
        assert many["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
        assert many["best_step"] == one["best_step"] and many["dev"] == one["dev"] and many["test"] == one["test"]
        ours, theirs = (load_file(tmp_path / f"{name}{i}" / "delta.safetensors") for name in ("together", "alone"))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_crash_costs_nothing_that_a_checkpoint_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = runs(tmp_path, "causal")[:3]
    undisturbed = tune_many(wanted, [tmp_path / f"whole{i}" for i in range(3)])
    folders = [tmp_path / f"broken{i}" for i in range(3)]
    step, count = Loop.update, 0

    def breaking(self, *args):
        nonlocal count
        count += 1
        if count == 17:
            raise KeyboardInterrupt
        step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "update", breaking)
        tune_many(wanted, folders)
    assert any((folder / "checkpoint.json").exists() for folder in folders)
    continued = tune_many(wanted, folders)
    for i, (one, other) in enumerate(zip(undisturbed, continued, strict=True)):
        assert other["test"] == one["test"] and other["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
        ours, theirs = (load_file(tmp_path / f"{name}{i}" / "delta.safetensors") for name in ("broken", "whole"))
        assert all(torch.allclose(ours[name], tensor, atol=1e-5) for name, tensor in theirs.items())
    assert tune_many(wanted, folders) == continued  # finished runs are returned as they are


def test_a_run_that_diverges_fails_alone(tmp_path: Path) -> None:
    good, other, *_ = runs(tmp_path, "causal")
    wild = Run("Full()", good.backbone, good.task, Recipe(**{**RECIPE.to_json(), "lr": 1e30, "clip": 0.0}))
    with pytest.raises(dt.DeltaTuneError, match=r"wild: .*the (loss is|gradient is)"):
        tune_many([good, wild, other], [tmp_path / "good", tmp_path / "wild", tmp_path / "other"])
    assert json.loads((tmp_path / "wild" / "failure.json").read_text())["error"] == "NonFiniteLoss"
    assert (tmp_path / "good" / "result.json").exists() and (tmp_path / "other" / "result.json").exists()


def test_what_cannot_be_trained_together_is_refused(tmp_path: Path) -> None:
    one = runs(tmp_path, "causal")[0]
    elsewhere = Run(one.delta, write_backbone(tmp_path / "other", "seq2seq"), one.task, one.recipe)
    dropping = Run(one.delta, one.backbone, one.task, Recipe(dropout=True))
    for second, message in ((elsewhere, "share one backbone"), (dropping, "dropout"), (one, "given twice")):
        with pytest.raises(dt.DeltaTuneError, match=message):
            tune_many([one, second], [tmp_path / "x", tmp_path / "y"])
    assert not (tmp_path / "x").exists()
