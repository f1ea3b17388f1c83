"""Answers of a backbone to the examples of a task, and their score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltatune.errors import DeltaTuneError
from deltatune.files import write_text
from deltatune.tasks import Example, Prompt, Task, score
from deltatune.tuning.encode import Codec, Ids, Row
from deltatune.tuning.generate import generate
from deltatune.tuning.recipe import Recipe
from deltatune.tuning.score import choose, score_candidates

if TYPE_CHECKING:
    from deltatune.backbones import Backbone


@dataclass(frozen=True)
class Questions:
    """Examples as token ids, made once and asked often: the rows to score where there are candidates, else prompts."""

    examples: list[Example]
    candidates: list[list[str]]
    rows: list[list[Row]]
    prompts: list[Ids]


def make_rows(codec: Codec, task: Task, examples: Sequence[Example]) -> list[Row]:
    """Return the training rows of examples: each prompt with its own answer."""
    prompts = [task.prompt(example, codec.kind) for example in examples]
    return [codec.row(prompt, prompt.target) for prompt in prompts]


def make_questions(codec: Codec, task: Task, examples: Sequence[Example]) -> Questions:
    """Return the questions of examples; raises `DeltaTuneError` when a classification example has no candidates."""
    prompts = [task.prompt(example, codec.kind) for example in examples]
    if task.kind == "generation":
        return Questions(list(examples), [], [], [codec.question(prompt) for prompt in prompts])
    candidates = [task.candidates(example) for example in examples]
    for example, names in zip(examples, candidates, strict=True):
        if not names:
            raise DeltaTuneError(
                f"example {example.id!r} of task {task.name!r} has neither labels nor options to choose from."
            )
    rows = [
        [codec.row(prompt, text) for text in task.texts(example)]
        for example, prompt in zip(examples, prompts, strict=True)
    ]
    return Questions(list(examples), candidates, rows, [])


def free_questions(codec: Codec, examples: Sequence[Example]) -> Questions:
    """Return the questions of texts that belong to no task: each is a prompt by itself, to be continued."""
    return Questions(list(examples), [], [], [codec.question(Prompt(example.input, "")) for example in examples])


def answer(backbone: Backbone, questions: Questions, codec: Codec, recipe: Recipe) -> list[str]:
    """Return one prediction for each example: the likeliest candidate, or generated text."""
    if questions.prompts:
        return generate(backbone, questions.prompts, codec.max_target, recipe.eval_batch, codec.pad)
    best = choose(score_candidates(backbone, questions.rows, recipe.eval_batch, codec.pad))
    return [names[index] for names, index in zip(questions.candidates, best, strict=True)]


def majority(task: Task, examples: Sequence[Example]) -> float | None:
    """Return the score of always answering the commonest target of `examples`; None for generation."""
    if task.kind == "generation":
        return None
    targets = [example.target for example in examples]
    commonest = max(dict.fromkeys(targets), key=targets.count)
    return score(task.metric, [commonest] * len(targets), examples)


def write_predictions(path: Path, examples: Sequence[Example], predictions: Sequence[str]) -> None:
    """Write one JSON line for each example: id, prediction, target."""
    lines = [
        json.dumps({"id": example.id, "prediction": prediction, "target": example.target}, ensure_ascii=False)
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    write_text(path, "\n".join(lines) + "\n")
