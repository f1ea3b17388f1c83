"""Training with compiled stacks: the numbers of a run without a compiler, few graphs, and its own name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo import register_backend
from torch._dynamo.utils import counters

import deltatune as dt
from deltatune.errors import DeltaTuneError
from deltatune.tuning import Recipe, Run, tune, tune_many
from deltatune.tuning.compiled import training_loss
from deltatune.tuning.loop import Loop
from deltatune.tuning.run import Session
from tests import tiny
from tests.tuning.test_many import precise
from tests.tuning.training import write_backbone, write_task

PLAIN = Recipe(steps=12, batch=4, lr=1e-2, eval_every=4, checkpoint_every=4, max_input=24, max_target=4, dev_limit=6)
RECIPE = dataclasses.replace(PLAIN, compiler="aot_eager")
DELTA = "LoRA(rank=2) + Adapter(size=4) + PrefixTuning(length=3)"


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()
    counters.clear()


def run(tmp_path: Path, kind: str, recipe: Recipe, delta: str = "LoRA(rank=2)") -> Run:
    backbone, task = write_backbone(tmp_path / "backbone", kind), write_task(tmp_path / "tasks")
    return Run(delta, backbone, task, recipe, seed=1)


def logged(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "masked"])
def test_a_compiled_run_ends_as_one_without(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "load", staticmethod(precise(Session.load)))
    plain = tune(run(tmp_path, kind, PLAIN, DELTA), tmp_path / "plain")
    assert not counters["stats"]
    compiled = tune(run(tmp_path, kind, RECIPE, DELTA), tmp_path / "compiled")
    assert 1 <= counters["stats"]["unique_graphs"] <= 4, "batches of all widths share their graphs"
    assert not counters["graph_break"]
    assert logged(tmp_path / "compiled") == pytest.approx(logged(tmp_path / "plain"), abs=1e-6)
    assert compiled["dev"] == plain["dev"] and compiled["test"] == plain["test"]
    assert compiled["cache"] == {"off": "what is compiled is computed as a whole"}
    ours, theirs = (load_file(tmp_path / name / "delta.safetensors") for name in ("compiled", "plain"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_killed_run_continues_with_the_numbers_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(tmp_path, "causal", RECIPE)
    tune(wanted, tmp_path / "whole")
    take = Loop.step

    def dying(self: Loop, *given: Any) -> None:
        take(self, *given)
        if self.progress.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr(Loop, "step", dying)
        tune(wanted, tmp_path / "killed")
    tune(wanted, tmp_path / "killed")
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")


def test_a_model_that_nothing_is_known_of_is_compiled_as_a_whole() -> None:
    model: Any = tiny.llama()
    wrapped = torch.nn.Module()
    wrapped.forward = lambda **batch: model(**batch)  # type: ignore[method-assign]
    wrapped.add_module("inner", model)
    batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.arange(8).view(2, 4)}
    loss = training_loss(wrapped, batch, "aot_eager")
    torch.testing.assert_close(loss(batch), model(**batch).loss)
    assert counters["stats"]["unique_graphs"]


def test_recipes_without_a_compiler_keep_their_names() -> None:
    assert "compiler" not in PLAIN.to_json()
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE and Recipe.from_json(PLAIN.to_json()) == PLAIN
    one, other = (Run("LoRA()", "pebble", "topic", recipe) for recipe in (PLAIN, RECIPE))
    assert one.id != other.id
    with pytest.raises(DeltaTuneError, match="no compiler 'inductr'.*inductor"):
        dataclasses.replace(PLAIN, compiler="inductr")


def test_what_goes_with_no_compiler_says_so(tmp_path: Path) -> None:
    wanted = run(tmp_path, "causal", RECIPE)
    with pytest.raises(DeltaTuneError, match="budget cannot be kept with compiler 'aot_eager'"):
        tune(wanted, tmp_path / "budget", memory_budget=10**9)
    with pytest.raises(DeltaTuneError, match="compiler = 'none'"):
        tune_many([wanted], [tmp_path / "many"])
    assert tune(wanted, tmp_path / "planned", memory_budget=0)["memory"] is None


def test_a_compiler_that_fails_is_named() -> None:
    @register_backend(name="deltatune_broken")
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("there is no g++ here")

    model: Any = tiny.llama()
    dt.attach(model, dt.LoRA())
    batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.arange(8).view(2, 4)}
    with pytest.raises(DeltaTuneError, match="'deltatune_broken' could not compile the LlamaModel.*no g"):
        training_loss(model, batch, "deltatune_broken")(batch)
