"""One pre-training run in a folder: it begins, or continues where its checkpoint stands, and exports its product."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from deltatune.backbones.pretrain import checkpoint, log
from deltatune.backbones.pretrain.checkpoint import Position
from deltatune.backbones.pretrain.corpus import all_documents, check_names, find_texts, tokenize
from deltatune.backbones.pretrain.export import export
from deltatune.backbones.pretrain.mixture import Mixture
from deltatune.backbones.pretrain.model import build_model, build_optimizers, learning_rate, set_rates
from deltatune.backbones.pretrain.objectives import Objective, objective
from deltatune.backbones.pretrain.settings import Settings, parse_settings
from deltatune.backbones.pretrain.tokenizer import load_or_train, token_bytes
from deltatune.backbones.pretrain.validation import validate
from deltatune.errors import DeltaTuneError
from deltatune.files import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

Report = dict[str, Any]
SCHEDULE = {"steps", "decay", "final"}
RECORD = {"log_every", "checkpoint_every", "validation_every", "validation_rows", "final_validation_rows"}
MAY_CHANGE = {f"train.{key}" for key in SCHEDULE | RECORD}


@dataclass
class Trainer:
    """Everything one run needs in memory; built by `prepare` from the settings and the folder alone."""

    settings: Settings
    out: Path
    device: torch.device
    model: PreTrainedModel
    optimizers: list[torch.optim.Optimizer]
    objective: Objective
    train: Mixture
    held_out: Mixture
    lengths: np.ndarray

    def autocast(self) -> torch.autocast:
        """bf16 matrix products with fp32 weights, or nothing at all for fp32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.train.precision == "bf16")


def pretrain(
    settings: Settings, text: Path, out: Path, device: str = "auto", report: Callable[[Report], None] | None = None
) -> Path:
    """Train the backbone that `settings` describe on the texts in `text`; return the Hugging Face folder `out`/model.

    `report` is called with every line that goes to `out`/log.jsonl. A run that was killed continues from its last
    checkpoint to the same weights, bit for bit on a CPU. Raises `DeltaTuneError` for a folder that holds a run of other
    settings, for unusable texts, and when the loss is no longer a number.
    """
    torch_device = choose_device(device)
    out.mkdir(parents=True, exist_ok=True)
    claim(settings, out, checkpoint.position(out / "checkpoint.safetensors").step)
    trainer = prepare(settings, text, out, torch_device)
    position = checkpoint.restore(out / "checkpoint.safetensors", trainer.model, trainer.optimizers)
    log.cut_back(out / "log.jsonl", position.step)
    return run(trainer, position, report or (lambda line: None))


def choose_device(name: str) -> torch.device:
    """`auto` takes a CUDA GPU where there is one; raises `DeltaTuneError` for one that is absent."""
    if name not in ("auto", "cpu", "cuda"):
        raise DeltaTuneError(f"--device is {name!r}; write auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeltaTuneError("--device is cuda, but torch finds no CUDA GPU here; write cpu or auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def claim(settings: Settings, out: Path, done: int) -> None:
    """Write the settings into a folder; raise `DeltaTuneError` when it holds a run of other settings.

    What is recorded may change at any time, and the schedule (more or fewer steps) as long as the `done` updates had
    the rates that it gives them: the outcome is that of a run that had these settings from the beginning.
    """
    path = out / "settings.json"
    old = parse_settings(read_json(path), str(path)) if path.exists() else settings
    different = settings.differences(old.to_json())
    rates = [[learning_rate(step, train) for step in range(done)] for train in (settings.train, old.train)]
    if set(different) <= MAY_CHANGE and settings.train.steps >= done and rates[0] == rates[1]:
        write_json(path, settings.to_json())
    elif different:
        raise DeltaTuneError(
            f"{out} holds a run with other settings (they differ in {', '.join(different)}); "
            "give --out a new folder, or take the settings back."
        )


def prepare(settings: Settings, text: Path, out: Path, device: torch.device) -> Trainer:
    """Tokenizer, tokens, model and optimisers; what is in the folder already is used as it is."""
    texts = find_texts(text)
    check_names(texts, settings)
    tokenizer = load_or_train(out / "tokenizer.json", all_documents(text, texts, settings), settings)
    files = tokenize(text, texts, tokenizer, settings, out)
    chosen = objective(settings, tokenizer.get_vocab())
    train, held_out = (Mixture(out, files, split, chosen.window, settings) for split in ("train", "held-out"))
    model = build_model(settings, tokenizer.get_vocab_size()).to(device)  # type: ignore[arg-type]
    optimizers = build_optimizers(model, settings.train)
    return Trainer(settings, out, device, model, optimizers, chosen, train, held_out, token_bytes(tokenizer, settings))


def run(trainer: Trainer, position: Position, report: Callable[[Report], None]) -> Path:
    """Do the updates that are left, with log lines, validations and checkpoints on the way, then the last export."""
    settings, train = trainer.settings, trainer.settings.train
    model = compiled(trainer)
    began, before = time.monotonic(), position.seconds
    for step in range(position.step, train.steps):
        loss, rate = update(trainer, model, step)
        done = step + 1
        spent = round(before + time.monotonic() - began, 3)
        position = Position(done, done * train.batch * trainer.objective.window, spent)
        if done % train.log_every == 0 or done == train.steps:
            line = {"step": done, "loss": loss, "lr": rate, "tokens": position.tokens, "seconds": spent}
            record(trainer, line, report)
        if done % train.validation_every == 0 and done < train.steps:
            measure(trainer, done, train.validation_rows, report)
        if done % train.checkpoint_every == 0 or done == train.steps:
            checkpoint.save(trainer.out / "checkpoint.safetensors", position, trainer.model, trainer.optimizers)
            export(trainer.model, settings, trainer.out)
    if not any(line.get("final") == train.steps for line in log.read_log(trainer.out / "log.jsonl")):
        measure(trainer, train.steps, train.final_validation_rows, report, final=True)
    return export(trainer.model, settings, trainer.out)


def compiled(trainer: Trainer) -> nn.Module:
    """The model that training calls: itself, or compiled for the one shape that training uses."""
    trainer.model.set_attn_implementation(trainer.settings.train.attention)
    if trainer.settings.train.compile:
        return torch.compile(trainer.model)  # type: ignore[return-value]
    return trainer.model


def update(trainer: Trainer, model: nn.Module, step: int) -> tuple[float, float]:
    """One update, a function of (weights, optimiser state, seed, step); returns its loss and learning rate."""
    train = trainer.settings.train
    windows, _ = trainer.train.read(step * train.batch, train.batch)
    batch = trainer.objective.batch(windows, np.random.default_rng([trainer.settings.seed, 3000, step]))
    trainer.model.train()
    with trainer.autocast():
        loss = model(**{key: value.to(trainer.device) for key, value in batch.items()}, use_cache=False).loss
    value = loss.item()
    if not math.isfinite(value):
        raise DeltaTuneError(
            f"the loss of step {step + 1} is {value}; lower train.lr (now {train.lr}), lengthen train.warmup, "
            'or set train.precision to "fp32", and begin in a new folder.'
        )
    rate = set_rates(trainer.optimizers, step, train)
    loss.backward()
    nn.utils.clip_grad_norm_(trainer.model.parameters(), train.clip)
    for optimizer in trainer.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return value, rate


def measure(trainer: Trainer, step: int, rows: int, report: Callable[[Report], None], final: bool = False) -> None:
    """Validate and record the outcome."""
    trainer.model.eval()
    outcome = validate(trainer.model, trainer.held_out, trainer.objective, rows, trainer.lengths, trainer.autocast())
    record(trainer, {"step": step, "validation": outcome} | ({"final": step} if final else {}), report)


def record(trainer: Trainer, line: Report, report: Callable[[Report], None]) -> None:
    """Add a line to the log and show it."""
    log.append(trainer.out / "log.jsonl", line)
    report(line)
