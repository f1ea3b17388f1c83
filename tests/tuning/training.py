"""A small training that runs in a process of its own and can be told to die at its n-th change of a file."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import deltatune as dt
from deltatune.tasks import Prompt
from deltatune.tuning import loop, run
from deltatune.tuning.encode import Codec, Row, collate
from deltatune.tuning.recipe import Recipe, Run
from tests.tuning import backbones as tiny

# Real processes that start in a moment: forks of a server that has imported once what they need.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "tests.tuning.training",
        "accelerate",
        "sklearn.metrics",
        "transformers.optimization",
        "transformers.models.llama.modeling_llama",
        "transformers.models.t5.modeling_t5",
    ]
)

RECIPE = Recipe(
    steps=24,
    batch=4,
    lr=1e-2,
    schedule="cosine",
    eval_every=5,
    checkpoint_every=4,
    dropout=True,
    max_input=16,
    max_target=4,
)


def rows(codec: Codec, count: int = 30) -> list[Row]:
    """Examples whose answer repeats the first word of the prompt."""
    words = tiny.ADJECTIVES
    prompts = [f"{words[i % 4]} {'very ' * (i % 5)}film {words[(i // 4) % 4]} answer :" for i in range(count)]
    return [codec.row(Prompt(text, ""), text.split()[0]) for text in prompts]


def make(
    folder: Path,
    recipe: Recipe = RECIPE,
    on_step: loop.OnStep | None = None,
    backbone: tiny.TinyBackbone | None = None,
    delta: str = 'Full().at("{attn,norm}")',
) -> loop.Loop:
    """A loop on a tiny backbone with a delta; dev score: minus the loss on held-out rows."""
    torch.set_num_threads(1)
    backbone = backbone or tiny.seq2seq()
    codec = Codec(backbone, recipe.max_input, recipe.max_target)
    model = backbone.model
    held_out = collate(rows(codec, 40)[30:], codec.pad)

    def evaluate() -> float:
        with torch.no_grad():
            return -float(model(**held_out).loss)

    return loop.Loop(dt.attach(model, dt.parse(delta)), rows(codec), codec.pad, recipe, 0, folder, evaluate, on_step)


def train(folder: str, changes: dict[str, Any] | None = None, die_at: int = 0) -> None:
    """Train in `folder` and write the final parameters; kill this process at its `die_at`-th change of a file."""
    if die_at:
        _die_at(die_at)
    training = make(Path(folder), Recipe(**{**RECIPE.to_json(), **(changes or {})}))
    training.run()
    save_file(loop.named(training.parameters), str(Path(folder) / "final.safetensors"))


def _die_at(count: int) -> None:
    left = count

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return call

    for name in ("replace", "fsync", "unlink", "truncate"):
        setattr(os, name, counted(getattr(os, name)))


def write_task(folder: Path, name: str = "echo", generation: bool = False) -> str:
    """Write a task whose answer is the first word of its input, and return its name; majority is 1 in 4."""
    words = tiny.ADJECTIVES
    sizes = {"train": 64, "dev": 16, "test": 24}
    records = [
        {
            "id": f"{split}/{i}",
            "split": split,
            "input": f"{words[i % 4]} {'very ' * (i % 5)}film {words[(i // 4) % 4]}",
            "target": words[i % 4],
        }
        for split, count in sizes.items()
        for i in range(count)
    ]
    entry = {
        "name": name,
        "kind": "generation" if generation else "classification",
        "labels": None if generation else words,
        "metric": "exact-match" if generation else "accuracy",
        "definition": "Repeat the first word.",
        "category": "test",
        "licence": "none",
        "template": {"text": "{input} answer :"},
        "file": f"{name}.jsonl",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "tasks.json").write_text(json.dumps({"tasks": [entry]}))
    return f"{folder}/{name}"


def write_backbone(folder: Path, kind: str = "causal") -> str:
    """Save a tiny backbone with its tokenizer as a folder, and return its name."""
    backbone = tiny.KINDS[kind]()
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return str(folder)


def tune(what: Run, folder: str, die_at: int = 0) -> None:
    """Do a run in `folder`; kill this process at its `die_at`-th change of a file."""
    torch.set_num_threads(1)
    if die_at:
        _die_at(die_at)
    run.tune(what, folder)
