"""One run from its value to its result: build, train, evaluate, write; killed anywhere, the same call continues it."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deltatune.backbones import Backbone, load
from deltatune.core.delta import Delta
from deltatune.core.evidence import MEASURED, evidence, needs
from deltatune.errors import DeltaTuneError
from deltatune.files import read_json, write_json, write_text
from deltatune.tasks import Example, score, task
from deltatune.tuning.answers import answer, majority, make_questions, make_rows
from deltatune.tuning.checkpoint import remove_checkpoint
from deltatune.tuning.encode import Codec, collate
from deltatune.tuning.environment import environment
from deltatune.tuning.loop import LOG, Loop, OnStep, Progress, compute
from deltatune.tuning.recipe import Run

EVIDENCE = 128  # training examples that data-dependent starts look at
RUN, RESULT, FAILURE, PREDICTIONS = "run.json", "result.json", "failure.json", "predictions.jsonl"


def tune(run: Run, folder: Path | str, on_step: OnStep | None = None) -> dict[str, Any]:
    """Train `run` in `folder` and return its result; a finished run is returned as it is, a begun one continued.

    Scores are in percent, times in seconds, memory in bytes. `on_step` gets every line of `log.jsonl`. An error is
    written to `failure.json` and raised; raises `DeltaTuneError` when the folder holds another run.
    """
    folder = Path(folder)
    _claim(run, folder)
    if (folder / RESULT).exists():
        remove_checkpoint(folder)
        return read_json(folder / RESULT)
    try:
        result = _Session(run, folder).result(on_step)
    except Exception as error:
        write_json(folder / FAILURE, {"error": type(error).__name__, "message": str(error)})
        raise
    write_json(folder / RESULT, result)
    (folder / FAILURE).unlink(missing_ok=True)
    remove_checkpoint(folder)
    return result


class _Session:
    """One attempt at a run: everything that is built for it."""

    def __init__(self, run: Run, folder: Path) -> None:
        import deltatune as dt

        self.started = time.perf_counter()
        self.run, self.folder, self.recipe = run, folder, run.recipe
        self.backbone = load(run.backbone)
        self.backbone_parameters = sum(parameter.numel() for parameter in self.backbone.model.parameters())
        self.task = task(run.task)
        self.codec = Codec(self.backbone, self.recipe.max_input, self.recipe.max_target)
        self.device = to_device(self.backbone)
        delta = dt.parse(run.delta)
        weights = dt.init(delta, self.backbone.model, run.seed, evidence=self._evidence(delta))
        self.count = weights.count
        self.attachment = dt.attach(self.backbone.model, weights)

    def result(self, on_step: OnStep | None) -> dict[str, Any]:
        """Train, evaluate once on test where the recipe says so, write what is kept, and return the result."""
        import deltatune as dt

        loading = time.perf_counter() - self.started
        progress, stopped = self._train(on_step)
        started = time.perf_counter()
        scores = self._test() if self.recipe.test else {"test": None, "majority": None}
        dt.save(self.attachment, self.folder)
        evaluating = time.perf_counter() - started
        return {
            "run": self.run.to_json(),
            "id": self.run.id,
            "metric": self.task.metric,
            **scores,
            "dev": progress.dev,
            "best_step": progress.best_step,
            "steps": progress.step,
            "stopped": stopped,
            "parameters": self.count,
            "backbone_parameters": self.backbone_parameters,
            "file_bytes": (self.folder / "delta.safetensors").stat().st_size,
            "seconds": {
                "train": progress.train_seconds,
                "evaluate": progress.evaluate_seconds + evaluating,
                "total": loading + progress.total_seconds + evaluating,
            },
            **_from_log(self.folder / LOG),
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens / progress.train_seconds if progress.train_seconds else None,
            "peak_memory_bytes": progress.peak_memory,
            "environment": environment(),
        }

    def _evidence(self, delta: Delta) -> dict[str, Any]:
        """Return what the delta's initialisers look at, measured on a random few of the training examples."""
        found: dict[str, Any] = {"tokenizer": self.backbone.tokenizer}
        if needs(self.backbone.model, delta) & MEASURED:
            examples = self._examples()
            some = random.Random(self.run.seed).sample(examples, min(EVIDENCE, len(examples)))
            rows = make_rows(self.codec, self.task, some)
            batches = (collate([row], self.codec.pad, self.device) for row in rows)
            found |= evidence(self.backbone.model, delta, batches)
        return found

    def _examples(self) -> list[Example]:
        """Return the examples to train on."""
        shots = self.recipe.shots
        return self.task.few_shot(shots, self.run.seed) if shots else self.task.split("train")

    def _test(self) -> dict[str, float | None]:
        """Answer the test split, write the predictions, and return their score and that of the commonest class."""
        examples = self.task.split("test")[: self.recipe.test_limit or None]
        predictions = self._answer(examples)
        write_predictions(self.folder / PREDICTIONS, examples, predictions)
        return {"test": score(self.task.metric, predictions, examples), "majority": majority(self.task, examples)}

    def _train(self, on_step: OnStep | None) -> tuple[Progress, str]:
        if not self.count:  # the backbone as it is: there is a dev score, and nothing to train
            dev = self._dev()
            return Progress(dev=dev() if dev else None), "steps"
        recipe, run = self.recipe, self.run
        rows = make_rows(self.codec, self.task, self._examples())
        loop = Loop(self.attachment, rows, self.codec.pad, recipe, run.seed, self.folder, self._dev(), on_step)
        progress = loop.run()
        return progress, progress.finished(recipe) or "steps"

    def _dev(self) -> Callable[[], float] | None:
        if not self.recipe.eval_every:
            return None
        examples = self.task.split("dev")[: self.recipe.dev_limit or None]
        questions = make_questions(self.codec, self.task, examples)
        return lambda: score(self.task.metric, answer(self.backbone, questions, self.codec, self.recipe), examples)

    def _answer(self, examples: list[Example]) -> list[str]:
        with compute(self.device, self.recipe):
            return answer(self.backbone, make_questions(self.codec, self.task, examples), self.codec, self.recipe)


def to_device(backbone: Backbone) -> torch.device:
    """Move a backbone to the device that accelerate chooses, ready to answer, and return the device."""
    from accelerate import PartialState

    device = PartialState().device or torch.device("cpu")
    backbone.model.to(device).eval()
    return device


def write_predictions(path: Path, examples: Sequence[Example], predictions: Sequence[str]) -> None:
    """Write one JSON line for each example: id, prediction, target."""
    lines = [
        json.dumps({"id": example.id, "prediction": prediction, "target": example.target}, ensure_ascii=False)
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")


def _claim(run: Run, folder: Path) -> None:
    """Write `run.json`, or raise when the folder belongs to another run."""
    path = folder / RUN
    content = {"id": run.id, **run.to_json()}
    if not path.exists():
        write_json(path, content)
        return
    found = read_json(path)
    if found.get("id") == run.id:
        return
    changed = [name for name in content if found.get(name) != content[name] and name != "id"]
    what = f"it differs in {', '.join(changed)}" if changed else "the data or the backbone has changed since"
    raise DeltaTuneError(
        f"{folder} holds another run, {found.get('id')}: {what}. Choose another folder or delete this one."
    )


def _from_log(path: Path) -> dict[str, float | None]:
    """Return the loss at the end (mean of the last 50 steps) and the median seconds of a step."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    steps = [line for line in lines if "loss" in line]
    return {
        "train_loss": statistics.fmean(line["loss"] for line in steps[-50:]) if steps else None,
        "step_seconds": statistics.median(line["seconds"] for line in steps) if steps else None,
    }
