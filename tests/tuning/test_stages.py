"""A second stage: a delta trained on top of a frozen one, and one folder that holds both."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from pathlib import Path

import pytest
import torch

import deltatune as dt
from deltatune.errors import DeltaTuneError
from deltatune.tuning import Recipe, Run, evaluate, tune
from tests.tuning import training

RECIPE = Recipe(steps=20, lr=1e-2, eval_every=10, checkpoint_every=10, max_input=24, max_target=4)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("stages")
    task, backbone = training.write_task(folder / "tasks"), training.write_backbone(folder / "causal")
    run = Run("VeRA(rank=8)", backbone, task, RECIPE, seed=1)
    tune(run, folder / "first")
    return run, folder / "first"


def test_the_second_stage_trains_its_own_leaves_and_saves_the_whole_composition(first, tmp_path):
    run, folder = first
    second = dataclasses.replace(run, delta="BitFit() + VeRA(rank=8)", seed=2, start=str(folder))
    result = tune(second, tmp_path / "second")
    before, whole = dt.Weights.read(folder), dt.Weights.read(tmp_path / "second")
    assert str(whole.delta) == "VeRA(rank=8) + BitFit() + VeRA(rank=8)"
    assert all(torch.equal(whole.tensors[name], tensor) for name, tensor in before.tensors.items())
    assert result["parameters"] == whole.count - before.count
    assert any(bool(t.any()) for name, t in whole.tensors.items() if name.startswith("1.")), "the biases have moved"
    assert result["run"] == second.to_json() and Run.from_json(result["run"]) == second
    assert evaluate(None, None, tmp_path / "second")["score"] == result["test"]


def test_a_run_is_named_by_what_it_starts_from_not_by_where_that_lies(first, tmp_path):
    run, folder = first
    assert "start" not in run.to_json()
    shutil.copytree(folder, tmp_path / "copy")
    one, two = (dataclasses.replace(run, start=str(place)) for place in (folder, tmp_path / "copy"))
    assert one.id == two.id != run.id
    dt.save(dataclasses.replace(dt.Weights.read(folder), seed=5), tmp_path / "copy")
    assert dataclasses.replace(two).id != one.id


def test_a_killed_second_stage_continues_to_the_same_artifact(first, tmp_path):
    run = dataclasses.replace(first[0], delta="LoRA(rank=2)", start=str(first[1]))
    tune(run, tmp_path / "whole")
    for die_at in (9, 14):
        process = training.PROCESSES.Process(target=training.tune, args=(run, str(tmp_path / "cut"), die_at))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL and not (tmp_path / "cut/result.json").exists()
    tune(run, tmp_path / "cut")
    for name in ("predictions.jsonl", "delta.safetensors", "delta.json", "run.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("start", "said"), [("nowhere", "no weights to start from in nowhere"), ("", "in .")])
def test_a_start_that_is_not_there_is_refused(first, start, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeltaTuneError, match=said):
        tune(dataclasses.replace(first[0], start=start), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_start_for_another_backbone_is_refused(first, tmp_path):
    run, folder = first
    other = training.write_backbone(tmp_path / "other", "seq2seq")
    with pytest.raises(DeltaTuneError, match="made for another backbone: LlamaForCausalLM"):
        tune(dataclasses.replace(run, backbone=other, start=str(folder)), tmp_path / "out")
