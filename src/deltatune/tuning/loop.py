"""The training loop: one delta's parameters, one backbone that stays as it is, resumable at any step."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.core.attach import Attachment
from deltatune.core.casts import Casts
from deltatune.core.motion import advance, drawn, moving, penalty, rates
from deltatune.core.products import priced
from deltatune.errors import DeltaTuneError
from deltatune.tuning.cache import Bound, Cache, Data, NoCache, frozen_cache
from deltatune.tuning.checkpoint import (
    cut_log,
    pack_optimizer,
    pack_random,
    read_checkpoint,
    sweep,
    unpack_optimizer,
    unpack_random,
    write_checkpoint,
)
from deltatune.tuning.compiled import training_loss
from deltatune.tuning.deterministic import deterministic
from deltatune.tuning.encode import Row, batches, collate, epoch_order, sizes_of
from deltatune.tuning.loss import Loss
from deltatune.tuning.memory import Peak, in_use
from deltatune.tuning.optim import learning_rate, make_optimizer
from deltatune.tuning.precision import computes_in
from deltatune.tuning.recipe import Recipe
from deltatune.tuning.widths import EXACT, Widths

OnStep = Callable[[dict[str, Any]], None]

LOG = "log.jsonl"


class NonFiniteLoss(DeltaTuneError):
    """The loss or its gradient became infinite or not a number."""


@dataclass
class Progress:
    """How far a run is; `dev` is the best dev score so far, seen at `best_step`, and `stale` counts evaluations since."""

    step: int = 0
    best_step: int = 0
    dev: float | None = None
    stale: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    total_seconds: float = 0.0
    peak_memory: int = 0

    def finished(self, recipe: Recipe) -> str | None:
        """Return why there is nothing more to train, `steps` or `patience`, or None."""
        if recipe.patience and self.stale >= recipe.patience:
            return "patience"
        return "steps" if self.step >= recipe.steps else None


@dataclass
class Loop:
    """One training: an attached delta on `rows`; `evaluate` gives the dev score, None for no dev evaluation."""

    attachment: Attachment
    rows: Sequence[Row]
    pad: int
    recipe: Recipe
    seed: int
    folder: Path
    evaluate: Callable[[], float] | None = None
    on_step: OnStep | None = None
    progress: Progress = field(default_factory=Progress)
    bound: Bound = field(default_factory=Bound)

    def __post_init__(self) -> None:
        from accelerate import Accelerator
        from accelerate.utils import set_seed

        self.accelerator = Accelerator(mixed_precision="no")
        self.device = self.accelerator.device
        self.model, self.parameters = self.attachment.model, list(self.attachment.parameters())
        self.loss: Loss = lambda batch: self.model(**batch).loss
        self.cache: Cache | NoCache = NoCache("runs that train together keep none")
        self.held: list[Tensor] = [*self.parameters, *moving(self.attachment)]
        self.casts = Casts(self.attachment, computes_in(self.recipe.precision))
        self.sizes = sizes_of(self.rows)
        self.first = epoch_order(self.sizes, self.recipe.batch, self.seed, 0)
        self.widths = Widths.of(self.rows, self.first) if priced(self.recipe.precision, self.device) else EXACT
        self.optimizer = make_optimizer(self.recipe, self.parameters, rates(self.attachment))
        self.rate = learning_rate(self.recipe)
        self.best: list[Tensor] = []
        self.losses: deque[float] = deque(maxlen=5)
        self.started = time.perf_counter()
        set_seed(self.seed)
        self.restore()
        self.log = (self.folder / LOG).open("a", encoding="utf-8")
        self.peak = Peak(self.device)

    def run(self) -> Progress:
        """Train to the end of the recipe and leave the best parameters in place."""
        order = self.order()
        with deterministic(self.device), self.log:
            self.prepare()
            self.model.train(self.recipe.dropout)
            while not self.progress.finished(self.recipe):
                self.step(next(order))
                self.look()
        self.finish()
        return self.progress

    def order(self) -> Iterator[list[Row]]:
        """Yield the batches from the step that the run is at."""
        for batch in batches(self.sizes, self.recipe.batch, self.seed, self.progress.step):
            yield [self.rows[index] for index in batch]

    def prepare(self) -> None:
        """Find out what of each step can be spared on this backbone with this delta."""
        data = Data(self.rows, self.first, self.batch)
        self.model.eval()  # what is tried draws no random numbers, which a continued run would miss
        self.loss = training_loss(self.model, data.batch(data.probe), self.recipe.compiler, self.widths)
        self.cache = frozen_cache(self.model, data, self.recipe, self.bound, self.folder)

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return rows as arguments of the model."""
        return collate(rows, self.pad, self.device, self.widths)

    def step(self, rows: list[Row]) -> None:
        """Take one step on one batch and log it."""
        started = time.perf_counter()
        batch = self.batch(rows)
        with self.drawn():
            with self.cache.given(rows), self.casts.made():
                loss = self.loss(batch)
            extra = penalty(self.attachment)
            self.accelerator.backward(loss if extra is None else loss + extra)
        self.update(loss.detach(), rows, started)

    def drawn(self) -> AbstractContextManager[None]:
        """The scope of a step, in which what the methods draw has its values."""
        return drawn(self.attachment, self.seed * self.recipe.steps + self.progress.step)

    def look(self) -> None:
        """Judge and save where the recipe says that it is time."""
        recipe, progress = self.recipe, self.progress
        last = progress.step == recipe.steps
        if self.evaluate and recipe.eval_every and (last or progress.step % recipe.eval_every == 0):
            self.judge(self.evaluate)
        ended = progress.finished(recipe)
        if recipe.checkpoint_every and (ended or progress.step % recipe.checkpoint_every == 0):
            self.save()

    def update(self, loss: Tensor, rows: list[Row], started: float) -> None:
        """Take the optimizer's step with the gradients that are there, and log it."""
        rate = self.rate(self.progress.step)
        norm: Any = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.clip or math.inf)
        # The only wait for the device in a step, before the optimizer can spoil the parameters.
        value, size = torch.stack([loss.float(), norm.detach().float()]).tolist()
        if not (math.isfinite(value) and math.isfinite(size)):
            raise NonFiniteLoss(self.explain(value, rate))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        self.optimizer.step()
        advance(self.attachment, self.progress.step + 1, self.recipe.steps)
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        tokens = sum(row.tokens for row in rows)
        self.losses.append(value)
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.train_seconds += seconds
        self.record({"loss": value, "lr": rate, "seconds": seconds, "tokens": tokens, "memory": in_use(self.device)})

    def judge(self, evaluate: Callable[[], float]) -> None:
        """Measure the dev score and keep the parameters when it is above the best so far."""
        progress = self.progress
        started = time.perf_counter()
        self.model.eval()
        score = evaluate()
        self.model.train(self.recipe.dropout)
        progress.evaluate_seconds += time.perf_counter() - started
        progress.stale += 1
        if progress.dev is None or score > progress.dev:
            progress.dev, progress.best_step, progress.stale = score, progress.step, 0
            self.best = [tensor.detach().clone() for tensor in self.held]
        self.record({"dev": score})

    def record(self, line: dict[str, Any]) -> None:
        """Add one line to the log and pass it to the caller."""
        line = {"step": self.progress.step, **line}
        try:
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()
        except OSError as error:
            raise DeltaTuneError(
                f"cannot write {self.folder / LOG}: {error.strerror}; make room and start again."
            ) from error
        if self.on_step:
            self.on_step(line)

    def save(self) -> None:
        """Write a checkpoint of all that the next step depends on."""
        os.fsync(self.log.fileno())
        self.tick()
        with self.peak.paused():
            self.progress.peak_memory = max(self.progress.peak_memory, self.peak.bytes)
            state, slots = pack_optimizer(self.optimizer)
            random, generators = pack_random()
            write_checkpoint(
                self.folder,
                {**dataclasses.asdict(self.progress), "log_bytes": self.log.tell(), "optimizer": slots, **generators},
                {**named(self.held), **state, **random},
                named(self.best),
            )

    def restore(self) -> None:
        """Continue from the checkpoint in the folder, or start with an empty log."""
        found = read_checkpoint(self.folder)
        sweep(self.folder, keep=(found[0]["state"], found[0]["best"]) if found else ())
        cut_log(self.folder / LOG, found[0]["log_bytes"] if found else 0)
        if found is None:
            return
        scalars, state, best = found
        for item in dataclasses.fields(Progress):
            setattr(self.progress, item.name, scalars[item.name])
        self.best = [best[name].to(self.device) for name in named(self.held) if name in best]
        put(self.held, [state[name] for name in named(self.held)])
        unpack_optimizer(self.optimizer, state, scalars["optimizer"])
        unpack_random(state, scalars)

    def finish(self) -> None:
        """Put the best parameters in place; without dev evaluations the last ones are the best."""
        self.tick()
        self.progress.peak_memory = max(self.progress.peak_memory, self.peak.note())
        self.model.eval()
        if self.best:
            put(self.held, self.best)
        else:
            self.progress.best_step = self.progress.step

    def tick(self) -> None:
        """Add the time since the last call to the total, which a kill can only lose back to the checkpoint."""
        now = time.perf_counter()
        self.progress.total_seconds += now - self.started
        self.started = now

    def explain(self, loss: float, rate: float) -> str:
        """Say what became infinite, when, and what to try."""
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is infinite or not a number"
        before = ", ".join(f"{value:.4g}" for value in self.losses) or "none"
        cures = [f"lr={self.recipe.lr / 10:.3g}", "a larger warmup"]
        cures += ["clip=1.0"] if not self.recipe.clip else []
        cures += ["precision='fp32'"] if self.recipe.precision != "fp32" else []
        return (
            f"{what} at step {self.progress.step + 1} (learning rate {rate:.3g}; losses before it: {before}). "
            f"Try {', '.join(cures[:-1])} or {cures[-1]}."
        )


def named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name tensors by their place, as a checkpoint holds them."""
    return {f"leaf/{index}": tensor for index, tensor in enumerate(tensors)}


def put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into tensors, in place."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
