"""A stand-in for `tune`: the same files and the same contract, with numbers from a formula instead of training."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltatune.files import write_json, write_text
from deltatune.tuning import Run

STRENGTH = {"PromptTuning": 0.55, "PrefixTuning": 0.78, "BitFit": 0.82, "LoRA": 0.9, "Adapter": 0.88, "Full": 0.93}
COUNT = {
    "PromptTuning": 5120,
    "PrefixTuning": 789_000,
    "BitFit": 14_336,
    "LoRA": 98_304,
    "Adapter": 270_000,
    "Full": 10_200_000,
}
BACKBONE = 10_200_000
ENVIRONMENT = {
    "python": "3.11.9",
    "deltatune": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "git": "0123456789abcdef0123456789abcdef01234567",
    "dirty": True,
    "platform": "Linux x86_64",
    "cpu": "A processor of the test",
    "cores": 2,
    "threads": 1,
    "gpu": None,
}


def fake_tune(run: Run, folder: Path, on_step: Callable[[dict], None] | None = None) -> dict[str, Any]:
    """Write what `tune` writes; sleep FAKE_SECONDS; count every start in `starts`; do as FAKE_TROUBLE says."""
    folder = Path(folder)
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    trouble(run, folder)
    method = run.delta.split("(")[0]
    curve, log = learn(run, STRENGTH.get(method, 0.7))
    for row in log:
        if on_step:
            on_step(row)
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    write_text(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    test = predict(run, folder, curve[-1] / 100)
    result = outcome(run, method, curve, test, log)
    write_json(folder / "result.json", result)
    return result


def trouble(run: Run, folder: Path) -> None:
    """Fail or die when FAKE_TROUBLE names the task of the run: "fail:<task>", "die:<task>", "die-once:<task>"."""
    kind, _, task = os.environ.get("FAKE_TROUBLE", "").partition(":")
    if task != run.task:
        return
    if kind == "fail":
        write_json(folder / "failure.json", {"error": "NonFiniteLoss", "message": "the loss is nan at step 3"})
        raise ValueError("the loss is nan at step 3")
    if kind == "die" or (kind == "die-once" and len((folder / "starts").read_text().splitlines()) == 1):
        os.kill(os.getpid(), 9)


def generator(run: Run) -> random.Random:
    """Numbers that depend on the run alone."""
    return random.Random(hashlib.sha256(json.dumps(run.to_json(), sort_keys=True).encode()).digest())


def learn(run: Run, strength: float) -> tuple[list[float], list[dict[str, Any]]]:
    """The dev curve and the log of a run whose best learning rate is 3e-3."""
    noise = generator(run)
    fit = strength * math.exp(-(math.log10(run.recipe.lr / 3e-3) ** 2)) * (0.7 if len(run.task) % 2 else 1.0)
    curve: list[float] = []
    log: list[dict[str, Any]] = []
    for step in range(1, run.recipe.steps + 1):
        log.append({"step": step, "loss": 3 * math.exp(-step * fit / 60) + noise.random() / 5, "seconds": 0.05})
        if step % run.recipe.eval_every == 0 or step == run.recipe.steps:
            curve.append(100 * fit * (1 - math.exp(-step * strength / 50)) + noise.gauss(0, 1))
            log.append({"step": step, "dev": curve[-1]})
    return curve, log


def predict(run: Run, folder: Path, rate: float) -> float:
    """Write 100 predictions of which about `rate` are right, and return their accuracy."""
    noise = generator(run)
    right = [noise.random() < rate for _ in range(100)]
    rows = ({"id": f"{i:03d}", "prediction": "yes" if ok else "no", "target": "yes"} for i, ok in enumerate(right))
    write_text(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return float(sum(right))


def outcome(run: Run, method: str, curve: list[float], test: float, log: list[dict[str, Any]]) -> dict[str, Any]:
    """A result as `tune` writes it."""
    count = COUNT.get(method, 50_000)
    return {
        "run": run.to_json(),
        "id": run.id,
        "metric": "accuracy",
        "test": test,
        "dev": max(curve),
        "best_step": run.recipe.steps,
        "steps": run.recipe.steps,
        "stopped": "steps",
        "parameters": count,
        "backbone_parameters": BACKBONE,
        "file_bytes": 4 * count + 512,
        "seconds": {"train": 12.5 + count / 1e6, "evaluate": 3.0, "total": 16.0 + count / 1e6},
        "train_loss": log[-2]["loss"],
        "step_seconds": 0.05 + count / 1e8,
        "tokens": 48_000,
        "tokens_per_second": 3840.0,
        "peak_memory_bytes": 300_000_000 + 12 * count,
        "majority": 30.0,
        "environment": ENVIRONMENT,
    }
