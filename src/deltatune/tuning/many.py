"""Many runs in one pass over one backbone: each row of a batch goes through its own run's delta, and each run learns alone.

A run keeps its own data order, optimizer, schedule, log, checkpoint and early stop, so it ends with the numbers that it
has when it is trained by itself, up to rounding, and can be continued with others or alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltatune.core.motion import penalty
from deltatune.core.route import Pool, pool
from deltatune.errors import DeltaTuneError
from deltatune.files import write_json
from deltatune.tuning.deterministic import deterministic
from deltatune.tuning.encode import Row, collate
from deltatune.tuning.loop import Loop, NonFiniteLoss
from deltatune.tuning.loss import cross_entropy
from deltatune.tuning.recipe import Run
from deltatune.tuning.run import FAILURE, Session, claim, conclude, finished


def tune_many(runs: Sequence[Run], folders: Sequence[Path | str]) -> list[dict[str, Any]]:
    """Train `runs` on one backbone together, each in its folder, and return their results, as `tune` does for one.

    Finished runs are returned as they are and begun ones continued. Raises `DeltaTuneError` when the runs differ in
    backbone or precision or use dropout; a run that fails is written to its `failure.json` and raised when the others
    have ended.
    """
    _check(runs)
    places = [Path(folder) for folder in folders]
    for run, folder in zip(runs, places, strict=True):
        claim(run, folder)
    todo = [(run, folder) for run, folder in zip(runs, places, strict=True) if finished(folder) is None]
    failed = _train(todo) if todo else {}
    if failed:
        raise DeltaTuneError("; ".join(f"{folder}: {error}" for folder, error in failed.items()))
    return [found for folder in places if (found := finished(folder)) is not None]


def _check(runs: Sequence[Run]) -> None:
    for name, values in {
        "backbone": {run.backbone for run in runs},
        "precision": {run.recipe.precision for run in runs},
    }.items():
        if len(values) > 1:
            raise DeltaTuneError(f"runs that train together share one {name}; found {', '.join(sorted(values))}.")
    if any(run.start is not None for run in runs):
        raise DeltaTuneError("a run that starts on an earlier delta trains alone; give it to `tune`.")
    if any(run.recipe.compiler != "none" for run in runs):
        raise DeltaTuneError("runs that train together are not compiled; write compiler = 'none'.")
    if any(run.recipe.dropout for run in runs):
        raise DeltaTuneError("runs that train together would share the backbone's dropout; write dropout = false.")
    if len({run.id for run in runs}) < len(runs):
        raise DeltaTuneError("the same run is given twice; give each run once.")


def _train(todo: list[tuple[Run, Path]]) -> dict[Path, Exception]:
    first = Session.load(todo[0][0])
    members = pool(first.model, train=True)
    sessions = {f"run_{run.id}": Session(run, folder, first, members) for run, folder in todo}
    loops = {name: loop for name, session in sessions.items() if (loop := session.loop(None)) is not None}
    failed = Together(loops, members, next(iter(sessions.values())).codec.kind).run()
    for name, error in failed.items():
        write_json(sessions[name].folder / FAILURE, {"error": type(error).__name__, "message": str(error)})
    for name, session in sessions.items():
        if name not in failed:
            progress = loops[name].progress if name in loops else session.untrained()
            conclude(session.folder, session.result(progress))
    return {sessions[name].folder: error for name, error in failed.items()}


class Together:
    """The loops of members of one pool, taking their steps in one forward and backward pass."""

    def __init__(self, loops: Mapping[str, Loop], members: Pool, kind: str) -> None:
        self.loops, self.members, self.kind = loops, members, kind
        self.orders: dict[str, Iterator[list[Row]]] = {name: loop.order() for name, loop in loops.items()}
        self.failed: dict[str, Exception] = {}

    def run(self) -> dict[str, Exception]:
        """Train all to the end of their recipes; return what became of those that could not go on."""
        with ExitStack() as scopes:
            for loop in self.loops.values():
                scopes.enter_context(loop.log)
                scopes.enter_context(deterministic(loop.device))
            while active := [n for n, loop in self.loops.items() if not self._over(n, loop)]:
                self.step(active)
        for name in self.loops.keys() - self.failed.keys():
            self.loops[name].finish()
        return self.failed

    def _over(self, name: str, loop: Loop) -> bool:
        return name in self.failed or loop.progress.finished(loop.recipe) is not None

    def step(self, names: list[str]) -> None:
        """Take one step of each of these runs."""
        started = time.perf_counter()
        rows = {name: next(self.orders[name]) for name in names}
        losses = self._backward(rows)
        tokens = {name: sum(row.tokens for row in own) for name, own in rows.items()}
        spent = time.perf_counter() - started
        for name in names:  # the time of the pass is shared out by tokens
            share = spent * tokens[name] / sum(tokens.values())
            try:
                self.loops[name].update(losses[name], rows[name], time.perf_counter() - share)
                self.loops[name].look()
            except NonFiniteLoss as error:
                self.failed[name] = error
                self.loops[name].optimizer.zero_grad()

    def _backward(self, rows: dict[str, list[Row]]) -> dict[str, Tensor]:
        one = next(iter(self.loops.values()))
        batch = collate([row for own in rows.values() for row in own], one.pad, one.device)
        with ExitStack() as scopes:
            for name in rows:
                scopes.enter_context(self.loops[name].drawn())
            scopes.enter_context(self.members.route([name for name, own in rows.items() for _ in own]))
            logits, labels = self._answered(one.model, batch)
            cut = [len(own) for own in rows.values()]
            pairs = zip(rows, logits.split(cut), labels.split(cut), strict=True)
            losses = {name: cross_entropy(own, targets) for name, own, targets in pairs}
            extras = [extra for name in rows if (extra := penalty(self.loops[name].attachment)) is not None]
            one.accelerator.backward(sum([*losses.values(), *extras], torch.zeros((), device=one.device)))
        return {name: loss.detach() for name, loss in losses.items()}

    def _answered(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the logits [rows, n, vocabulary] and the labels [rows, n] that they are to give."""
        labels = batch.pop("labels")
        if self.kind == "seq2seq":
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        logits = model(**batch).logits
        return (logits[:, :-1], labels[:, 1:]) if self.kind == "causal" else (logits, labels)
