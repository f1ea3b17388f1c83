"""Accuracy on clean and on mistyped texts: of a prefix, of LoRA, and of the prefix in closed loop."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import deltatune as dt
from deltatune.core.attach import Attachment
from deltatune.tasks import Example, score, task
from deltatune.theory.attack import attacked
from deltatune.theory.robust import Manifolds, manifolds, steered
from deltatune.tuning import Run
from deltatune.tuning.answers import answer, make_questions
from deltatune.tuning.encode import pad_inputs
from studies.theory.data import codec_of
from studies.theory.state import State

Loop = Mapping[str, Any]  # steps and rate of the adjustment


def robust(state: State, seed: int) -> None:
    """Measure the accuracy of a prefix, open and closed loop, and of LoRA."""
    for name in state.plan.robust["tasks"]:
        prefix = state.plan.longer(state.chosen("PrefixTuning"), name, seed)
        lora = state.plan.run(state.methods()["LoRA"], name, seed)
        if state.has(prefix) and state.has(lora):
            state.measured(f"robust-{name}-{seed}", partial(_compare, state, prefix, lora))


def chosen(state: State) -> Loop:
    """Return the adjustment that is best on the attacked dev split of the search's task."""
    best = state.chosen("PrefixTuning")
    run = next(run for choice, run in state.plan.searched()["PrefixTuning"] if choice == best)

    def measure() -> list[list[Any]]:
        examples = attacked(task(run.task).split("dev")[:100], state.plan.robust["attack"])
        with Answering(state, run) as subject:
            known = subject.planes()
            return [[loop, subject.score(examples, known, loop)] for loop in state.plan.robust["candidates"]]

    return max(state.measured("loop", measure), key=lambda pair: pair[1])[0]


def _compare(state: State, prefix: Run, lora: Run) -> dict[str, dict[str, float]]:
    clean = task(prefix.task).split("test")
    texts = {"clean": clean, "attacked": attacked(clean, state.plan.robust["attack"], prefix.seed)}
    found = {}
    with Answering(state, lora) as subject:
        found["LoRA"] = {kind: subject.score(examples) for kind, examples in texts.items()}
    with Answering(state, prefix) as subject:
        found["PrefixTuning"] = {kind: subject.score(examples) for kind, examples in texts.items()}
        known, loop = subject.planes(), chosen(state)
        found["closed loop"] = {kind: subject.score(examples, known, loop) for kind, examples in texts.items()}
        found["planes"] = {name: plane.basis.shape[1] for name, plane in known.items()}
    return found


class Answering:
    """A finished run's delta on the backbone for the time of a `with`, answering its task."""

    def __init__(self, state: State, run: Run) -> None:
        self.state, self.run, self.task = state, run, task(run.task)
        self.codec, self.model = codec_of(state), state.backbone.model.eval()
        self.attachment: Attachment

    def __enter__(self) -> Answering:
        self.attachment = dt.attach(self.model, self.state.weights(self.run))
        return self

    def __exit__(self, *error: object) -> None:
        self.attachment.detach()

    def planes(self) -> dict[str, Any]:
        """Return the planes of the states of training texts that are answered correctly."""
        plan = self.state.plan.robust
        texts = random.Random(self.run.seed).sample(self.task.split("train"), plan["texts"])
        right = [e for e, said in zip(texts, self.answers(texts), strict=True) if said == e.target]
        return manifolds(self.model, map(self.prompts, self._batches(right)), plan["share"])

    def score(self, examples: Sequence[Example], known: Manifolds | None = None, loop: Loop | None = None) -> float:
        """Return the score on examples, with the loop closed where planes are given."""
        if known is None or loop is None:
            return score(self.task.metric, self.answers(examples), examples)
        found: list[str] = []
        for batch in self._batches(examples):
            with steered(self.attachment, self.prompts(batch), known, **loop):
                found += self.answers(batch)
        return score(self.task.metric, found, examples)

    def answers(self, examples: Sequence[Example]) -> list[str]:
        """Return the likeliest answer to each example."""
        questions = make_questions(self.codec, self.task, list(examples))
        with torch.no_grad():
            return answer(self.state.backbone, questions, self.codec, self.run.recipe)

    def prompts(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return prompts beside the decoder's first token, which answers."""
        texts = [self.codec.question(self.task.prompt(example, self.codec.kind)) for example in examples]
        start: Any = self.model.config
        first = torch.full((len(texts), 1), start.decoder_start_token_id)
        return {**pad_inputs(texts, self.codec.pad), "decoder_input_ids": first}

    def _batches(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        size = self.run.recipe.eval_batch
        return (examples[first : first + size] for first in range(0, len(examples), size))
