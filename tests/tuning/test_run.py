"""Whole runs on tiny backbones in folders: what they leave behind, and that nothing can break them for good."""

from __future__ import annotations

import dataclasses
import json
import platform
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from deltatune.errors import DeltaTuneError
from deltatune.tasks import score, task
from deltatune.tuning import NonFiniteLoss, Recipe, Run, evaluate, predict, tune
from deltatune.tuning.environment import environment
from tests.tuning import training

RECIPE = Recipe(steps=60, lr=3e-2, eval_every=20, checkpoint_every=20, max_input=24, max_target=4)
RESULT = {
    "run", "id", "metric", "test", "dev", "train_loss", "best_step",
    "steps", "stopped", "parameters", "backbone_parameters", "file_bytes",
    "seconds", "step_seconds", "longest_step_seconds", "tokens", "tokens_per_second",
    "peak_memory_bytes", "memory", "majority", "cache", "environment",
}  # fmt: skip


@dataclasses.dataclass
class Finished:
    run: Run
    folder: Path
    result: dict[str, Any]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "task": training.write_task(folder / "tasks"),
        "words": training.write_task(folder / "more", "words", generation=True),
        **{kind: training.write_backbone(folder / kind, kind) for kind in ("causal", "seq2seq", "masked")},
    }


@pytest.fixture(scope="module")
def finished(names: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    run = Run("Full()", names["causal"], names["task"], dataclasses.replace(RECIPE, lr=5e-3), seed=1)
    folder = tmp_path_factory.mktemp("finished") / "run"
    return Finished(run, folder, tune(run, folder))


def test_a_run_leaves_its_result_its_weights_and_its_predictions(finished: Finished) -> None:
    result, folder = finished.result, finished.folder
    assert result.keys() == RESULT
    assert result == json.loads((folder / "result.json").read_text())
    left = {path.name for path in folder.iterdir()}
    assert left == {"run.json", "log.jsonl", "delta.safetensors", "delta.json", "predictions.jsonl", "result.json"}
    examples = task(finished.run.task).split("test")
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [(line["id"], line["target"]) for line in lines] == [(e.id, e.target) for e in examples]
    assert result["test"] == score("accuracy", [line["prediction"] for line in lines], examples)
    assert (result["id"], result["run"]) == (finished.run.id, finished.run.to_json())
    assert result["steps"] == 60 and result["stopped"] == "steps" and result["best_step"] in (20, 40, 60)
    assert result["file_bytes"] == (folder / "delta.safetensors").stat().st_size
    assert result["parameters"] == sum(t.numel() for t in load_file(folder / "delta.safetensors").values())
    assert result["seconds"]["total"] >= result["seconds"]["train"] > 0
    assert result["peak_memory_bytes"] > 1 << 26 and result["tokens_per_second"] > 0


def test_a_run_learns(finished: Finished) -> None:
    assert finished.result["majority"] == 25.0
    assert finished.result["test"] > 60 and finished.result["dev"] > 60


def test_a_finished_run_is_returned_and_not_touched(finished: Finished) -> None:
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.folder.iterdir()}
    steps: list[Any] = []
    assert tune(finished.run, finished.folder, steps.append) == finished.result
    assert steps == []
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.folder.iterdir()} == before


def test_a_folder_of_another_run_is_refused(finished: Finished) -> None:
    other = dataclasses.replace(finished.run, seed=2, delta="LoRA(rank=2)")
    with pytest.raises(DeltaTuneError, match=f"holds another run, {finished.run.id}: it differs in delta, seed"):
        tune(other, finished.folder)


def test_the_saved_delta_scores_what_the_run_scored(finished: Finished, tmp_path: Path) -> None:
    found = evaluate(None, None, finished.folder, out=tmp_path / "out.jsonl")
    assert found["score"] == finished.result["test"] and found["majority"] == 25.0
    assert (tmp_path / "out.jsonl").read_bytes() == (finished.folder / "predictions.jsonl").read_bytes()
    bare = evaluate(finished.run.backbone, finished.run.task, split="dev", limit=8)
    assert bare["examples"] == 8 and bare["score"] < 60


def test_predict_answers_in_the_words_of_the_task(finished: Finished) -> None:
    examples = task(finished.run.task).split("test")[:8]
    expected = [
        json.loads(line)["prediction"] for line in (finished.folder / "predictions.jsonl").read_text().splitlines()
    ]
    assert predict(None, finished.folder, [example.input for example in examples]) == expected[:8]
    assert predict(None, finished.folder, []) == []
    free = predict(finished.run.backbone, None, ["the film"])
    assert len(free) == 1 and isinstance(free[0], str)


def test_what_is_not_named_is_asked_for(names: dict[str, str]) -> None:
    with pytest.raises(DeltaTuneError, match=r"no backbone is named, and no run.json"):
        predict(None, None, ["a"])
    with pytest.raises(DeltaTuneError, match="no task is named"):
        evaluate(names["causal"], None)


def test_the_id_follows_what_is_run_on(names: dict[str, str], tmp_path: Path) -> None:
    name = training.write_task(tmp_path / "tasks")
    run = Run("LoRA(rank=2)", names["causal"], name)
    assert run.id == Run("LoRA(rank = 2)", names["causal"], name).id and len(run.id) == 12
    others = [
        dataclasses.replace(run, seed=1),
        dataclasses.replace(run, delta="LoRA(rank=3)"),
        dataclasses.replace(run, backbone=names["seq2seq"]),
        dataclasses.replace(run, recipe=Recipe(steps=7)),
    ]
    file = tmp_path / "tasks" / "echo.jsonl"
    file.write_text(file.read_text().replace("film bad", "film fine"))
    changed = Run("LoRA(rank=2)", names["causal"], name)
    assert len({run.id, changed.id, *(other.id for other in others)}) == 6


@pytest.mark.parametrize("delta", ["LoRA(rank=2)", "PromptTuning(length=4)", "PrefixTuning(length=4)", "BitFit()"])
@pytest.mark.parametrize("kind", ["causal", "seq2seq", "masked"])
def test_methods_on_every_kind(kind: str, delta: str, names: dict[str, str], tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=6, eval_every=3, dev_limit=4, test_limit=8, shots=2)
    result = tune(Run(delta, names[kind], names["task"], recipe), tmp_path)
    assert result["steps"] == 6 and result["parameters"] > 0
    assert evaluate(None, None, tmp_path, limit=8)["score"] == result["test"]
    sizes = [json.loads(line)["tokens"] for line in (tmp_path / "log.jsonl").read_text().splitlines() if "loss" in line]
    assert len(sizes) == 6


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_generation_task(kind: str, names: dict[str, str], tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, lr=2e-2, steps=100, eval_every=0)
    result = tune(Run("Full()", names[kind], names["words"], recipe), tmp_path)
    assert result["majority"] is None and result["metric"] == "exact-match"
    assert result["test"] > 40, "always the same word is right in 1 of 4"


def test_no_trained_parameters_means_the_bare_backbone(names: dict[str, str], tmp_path: Path) -> None:
    result = tune(Run("Delta()", names["causal"], names["task"], RECIPE), tmp_path)
    assert (result["steps"], result["parameters"], result["train_loss"]) == (0, 0, None)
    assert result["test"] == evaluate(names["causal"], names["task"])["score"]


def test_a_failure_is_written_down_and_forgotten_after_success(names: dict[str, str], tmp_path: Path) -> None:
    bad = Run(
        "LoRA(rank=2)", names["causal"], names["task"], dataclasses.replace(RECIPE, optimizer="sgd", lr=1e38, clip=0.0)
    )
    with pytest.raises(NonFiniteLoss) as caught:
        tune(bad, tmp_path / "bad")
    written = json.loads((tmp_path / "bad" / "failure.json").read_text())
    assert written == {"error": "NonFiniteLoss", "message": str(caught.value)}
    assert not (tmp_path / "bad" / "result.json").exists()
    good = dataclasses.replace(bad, recipe=dataclasses.replace(RECIPE, steps=2))
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "failure.json").write_text("{}")
    tune(good, tmp_path / "good")
    assert not (tmp_path / "good" / "failure.json").exists()


def test_killed_at_every_change_of_a_file(names: dict[str, str], tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=4, eval_every=2, checkpoint_every=2, test_limit=8, dev_limit=8)
    run = Run("LoRA(rank=2)", names["causal"], names["task"], recipe)
    whole = tune(run, tmp_path / "whole")
    for die_at in range(1, 80):
        process = training.PROCESSES.Process(target=training.tune, args=(run, str(tmp_path / "cut"), die_at))
        process.start()
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert die_at > 10
    cut = tune(run, tmp_path / "cut")
    measured = ("seconds", "step_seconds", "tokens_per_second", "peak_memory_bytes", "environment")
    assert {k: v for k, v in cut.items() if k not in measured} == {k: v for k, v in whole.items() if k not in measured}
    for name in ("predictions.jsonl", "delta.safetensors", "delta.json", "run.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_the_environment_names_versions_and_hardware_but_nobody() -> None:
    import getpass

    found = environment()
    assert found["python"] == platform.python_version() and found["torch"] and found["cores"] >= 1
    assert (found["git"] is None) == (found["dirty"] is None)
    text = json.dumps(found)
    assert str(Path.home()) not in text and platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text


def test_a_real_backbone_learns_a_real_task(
    shared_models: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven intents of spoken commands; a 260k-parameter story model, LoRA on every linear layer."""
    monkeypatch.setenv("DELTATUNE_MODELS", str(shared_models))
    monkeypatch.setenv("DELTATUNE_DATA", str(shared_data))
    delta = 'LoRA(rank=8).at("{attn.q,attn.k,attn.v,attn.o,ffn.gate,ffn.up,ffn.down}")'
    recipe = Recipe(steps=80, lr=5e-3, eval_every=0, test_limit=60, max_input=48)
    result = tune(Run(delta, "stories260k", "snips_intent", recipe), tmp_path)
    assert result["majority"] < 25
    assert result["test"] > result["majority"] + 15
