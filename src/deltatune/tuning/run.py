"""One run from its value to its result: build, train, evaluate, write; killed anywhere, the same call continues it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltatune.backbones import Backbone, skeleton
from deltatune.core.delta import Delta
from deltatune.core.evidence import MEASURED, evidence, needs
from deltatune.core.recompute import recompute
from deltatune.core.route import Pool
from deltatune.errors import DeltaTuneError
from deltatune.files import read_json, write_json
from deltatune.tasks import Example, score, task
from deltatune.tuning import heap
from deltatune.tuning.answers import Questions, answer, majority, make_questions, make_rows, write_predictions
from deltatune.tuning.budget import plannable
from deltatune.tuning.cache import Bound
from deltatune.tuning.checkpoint import remove_checkpoint
from deltatune.tuning.encode import Codec, collate
from deltatune.tuning.environment import environment
from deltatune.tuning.log import Longest, ended, steps_of
from deltatune.tuning.loop import LOG, Loop, OnStep, Progress
from deltatune.tuning.memory import Peak
from deltatune.tuning.precision import computes_in, load_for
from deltatune.tuning.recipe import TERMS, Run

if TYPE_CHECKING:
    from deltatune.tuning.ledger import Evaluate, Ledger

EVIDENCE = 128  # training examples that data-dependent starts look at
RUN, RESULT, FAILURE, PREDICTIONS = "run.json", "result.json", "failure.json", "predictions.jsonl"


def tune(
    run: Run,
    folder: Path | str,
    on_step: OnStep | None = None,
    cache: Bound | None = None,
    memory_budget: int | None = None,
) -> dict[str, Any]:
    """Train `run` in `folder` and return its result; a finished run is returned as it is, a begun one continued.

    Scores are in percent, times in seconds, memory in bytes. `on_step` gets every line of `log.jsonl`. `cache` bounds what
    is kept of the blocks that no trained tensor reaches; it changes no result, and is 1 GB in memory unless given. With a
    `memory_budget` the run is planned first, keeps no cache, and recomputes as many blocks as bring its peak under that; 0
    plans without a limit. It changes no number of the run. An error is written to `failure.json` and raised; raises `DeltaTuneError`
    when the folder holds another run, or when the budget cannot be kept.
    """
    folder = Path(folder)
    planned = plannable(run.recipe, memory_budget)
    claim(run, folder)
    found = finished(folder)
    if found is not None:
        return found
    started = time.perf_counter()
    try:
        session = Session(run, folder, Session.load(run), started=started)
        loop = session.loop(on_step, Bound(0) if memory_budget else cache)
        if loop and memory_budget is not None and planned:
            session.plan(loop, memory_budget)
        result = session.result(loop.run() if loop else session.untrained())
    except Exception as error:
        write_json(folder / FAILURE, {"error": type(error).__name__, "message": str(error)})
        raise
    return conclude(folder, result)


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the result of a finished run, and None for another."""
    if not (folder / RESULT).exists():
        return None
    remove_checkpoint(folder)
    return read_json(folder / RESULT)


def conclude(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write the result of a run, which finishes it, and return it."""
    write_json(folder / RESULT, result)
    (folder / FAILURE).unlink(missing_ok=True)
    remove_checkpoint(folder)
    return result


class Session:
    """One attempt at a run: everything that is built for it, on a backbone of its own or as a member of a pool."""

    def __init__(
        self, run: Run, folder: Path, backbone: Backbone, members: Pool | None = None, started: float | None = None
    ) -> None:
        import deltatune as dt

        started = started or time.perf_counter()
        self.run, self.folder, self.recipe = run, folder, run.recipe
        self.backbone, self.device = backbone, next(backbone.model.parameters()).device
        own = (p for name, p in backbone.model.named_parameters() if not name.startswith("deltas."))
        self.backbone_parameters = sum(parameter.numel() for parameter in own)
        self.task = task(run.task)
        self.codec = Codec(self.backbone, self.recipe.max_input, self.recipe.max_target)
        self.stages = [] if run.start is None else [dt.load(self.backbone.model, run.start, "start")]
        for stage in self.stages:
            stage.freeze()
        delta = dt.parse(run.delta)
        weights = dt.init(delta, self.backbone.model, run.seed, evidence=self._evidence(delta))
        self.count = weights.count
        self.trained: Loop | None = None
        self.questions: Questions | None = None
        self.memory: dict[str, Any] | None = None
        self.longest: Longest | None = None
        self.scope: Callable[[], AbstractContextManager[Any]] = nullcontext
        if members is None:
            self.attachment = dt.attach(self.backbone.model, weights)
        else:
            name = f"run_{run.id}"
            members.add(name, weights)
            self.attachment, self.scope = members[name], lambda: members.route(name)
        self.stages.append(self.attachment)
        self.loading = time.perf_counter() - started

    @staticmethod
    def load(run: Run) -> Backbone:
        """Return the run's backbone, held as its recipe says, on the device that computes, ready to answer."""
        return load_for(run.backbone, run.recipe.precision)

    def result(self, progress: Progress) -> dict[str, Any]:
        """Evaluate once on test where the recipe says so, write what is kept, and return the result."""
        import deltatune as dt

        started = time.perf_counter()
        scores = self._test() if self.recipe.test else {"test": None, "majority": None}
        dt.save(dt.join(self.backbone.model, *self.stages), self.folder)
        evaluating = time.perf_counter() - started
        steps = steps_of(self.folder / LOG)
        return {
            "run": self.run.to_json(),
            "id": self.run.id,
            "metric": self.task.metric,
            **scores,
            "dev": progress.dev,
            "best_step": progress.best_step,
            "steps": progress.step,
            "stopped": progress.finished(self.recipe) or "steps",
            "parameters": self.count,
            "backbone_parameters": self.backbone_parameters,
            "file_bytes": (self.folder / "delta.safetensors").stat().st_size,
            "seconds": {
                "train": progress.train_seconds,
                "evaluate": progress.evaluate_seconds + evaluating,
                "total": self.loading + progress.total_seconds + evaluating,
            },
            **ended(steps),
            "longest_step_seconds": self.longest and self.longest.beside(steps),
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens / progress.train_seconds if progress.train_seconds else None,
            "peak_memory_bytes": progress.peak_memory,
            "cache": self.trained.cache.report if self.trained else None,
            "memory": self.memory,
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

    def loop(self, on_step: OnStep | None, cache: Bound | None = None) -> Loop | None:
        """Return what trains the run, or None when its delta has nothing to train."""
        if not self.count:
            return None
        recipe, run = self.recipe, self.run
        rows = make_rows(self.codec, self.task, self._examples())
        self.trained = Loop(
            self.attachment,
            rows,
            self.codec.pad,
            recipe,
            run.seed,
            self.folder,
            self._dev(),
            on_step,
            bound=cache or Bound(),
        )
        return self.trained

    def plan(self, loop: Loop, budget: int) -> None:
        """Plan the run's memory and recompute blocks as its budget says; the result has `memory`, planned and found before."""
        from deltatune.tuning.budget import beside, within
        from deltatune.tuning.forecast import longest, resident
        from deltatune.tuning.ledger import ledger
        from deltatune.tuning.prices import prices

        model, delta = skeleton(self.run.backbone), self.attachment.delta
        shape, steps = longest(loop.rows, self.recipe, self.run.seed, loop.widths)
        evaluate = self._planned_evaluation()
        if evaluate:  # a metric's library is loaded by its first use, and is no part of what a method takes
            some = self.task.split("dev")[:1]
            score(self.task.metric, [example.target for example in some], some)
        if budget:
            heap.give_back()
        held = resident(self.device)

        def planned(paths: Sequence[str]) -> Ledger:
            made = ledger(model, delta, shape, self.recipe, evaluate, paths, price.seconds, self.device)
            return beside(made, held)

        with torch.random.fork_rng(devices=[]):
            price = prices(self.device, computes_in(self.recipe.precision))
            try:
                found = within(budget, planned)
            except DeltaTuneError:
                if budget:
                    raise
                return  # a run that cannot be planned can be trained
        recompute(self.attachment, found.recomputed)
        loop.peak = Peak(self.device)  # planning took memory too
        self.memory = {"resident": held, "budget": budget, "planned": found.peak, "ledger": found.to_json()}
        self.longest = Longest(found.seconds, steps)

    def _planned_evaluation(self) -> Evaluate | None:
        from deltatune.tuning.forecast import scoring, writing

        asked, kind = self.questions, self.backbone.kind
        if asked is None:
            return None
        if asked.prompts:
            return writing(kind, asked.prompts, self.recipe, self.codec.max_target)
        return scoring(kind, asked.rows, self.recipe, self.codec.pad)

    def untrained(self) -> Progress:
        """Return the progress of the backbone as it is: there is a dev score, and nothing to train."""
        dev = self._dev()
        return Progress(dev=dev() if dev else None)

    def _dev(self) -> Callable[[], float] | None:
        if not self.recipe.eval_every:
            return None
        examples = self.task.split("dev")[: self.recipe.dev_limit or None]
        self.questions = questions = make_questions(self.codec, self.task, examples)

        def judge() -> float:
            with self.scope():
                return score(self.task.metric, answer(self.backbone, questions, self.codec, self.recipe), examples)

        return judge

    def _answer(self, examples: list[Example]) -> list[str]:
        with self.scope():
            return answer(self.backbone, make_questions(self.codec, self.task, examples), self.codec, self.recipe)


def claim(run: Run, folder: Path) -> None:
    """Write `run.json`, or raise when the folder belongs to another run."""
    path, content = folder / RUN, run.record()
    if not path.exists():
        write_json(path, content)
        return
    found = {TERMS: content[TERMS], **read_json(path)}
    if found.get("id") == run.id:
        return
    changed = [name for name in content if found.get(name) != content[name] and name != "id"]
    what = f"it differs in {', '.join(changed)}" if changed else "the data or the backbone has changed since"
    raise DeltaTuneError(
        f"{folder} holds another run, {found.get('id')}: {what}. Choose another folder or delete this one."
    )
