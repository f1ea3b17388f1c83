"""Using what was tuned: score a split, or answer texts, with a backbone as it is or with a folder of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from deltatune.errors import DeltaTuneError
from deltatune.files import read_json
from deltatune.tasks import Example, score
from deltatune.tasks import task as find_task
from deltatune.tuning.answers import answer, free_questions, majority, make_questions, write_predictions
from deltatune.tuning.encode import Codec
from deltatune.tuning.precision import load_for
from deltatune.tuning.recipe import Recipe, Run
from deltatune.tuning.run import RUN


@dataclass(frozen=True)
class Setup:
    """What to answer with: names, and how long texts may be."""

    backbone: str
    task: str | None
    weights: Path | None
    recipe: Recipe


def setup(backbone: str | None, task: str | None, weights: Path | str | None) -> Setup:
    """Fill what is not given from the `run.json` beside the weights; raises `DeltaTuneError` when there is none."""
    folder = None if weights is None else Path(weights)
    if folder is not None and not folder.exists():
        raise DeltaTuneError(f"there is no folder {folder}; give one that tune wrote.")
    run = _run_of(folder)
    backbone = backbone or (run.backbone if run else None)
    if backbone is None:
        raise DeltaTuneError("no backbone is named, and no run.json beside weights tells which; write its name.")
    return Setup(backbone, task or (run.task if run else None), folder, run.recipe if run else Recipe())


def evaluate(
    backbone: str | None,
    task: str | None,
    weights: Path | str | None = None,
    split: Literal["train", "dev", "test"] = "test",
    limit: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Return the score in percent on a split, as `{score, metric, majority, examples, ...}`.

    Without `weights` the bare backbone answers. `limit` keeps the first examples, 0 all; `out` gets the predictions.
    """
    plan = setup(backbone, task, weights)
    if plan.task is None:
        raise DeltaTuneError("no task is named, and no run.json beside weights tells which; write its name.")
    subject = find_task(plan.task)
    examples = subject.split(split)[: limit or None]
    predictions = _answers(plan, examples)
    if out is not None:
        write_predictions(out, examples, predictions)
    return {
        "backbone": plan.backbone,
        "task": subject.name,
        "split": split,
        "metric": subject.metric,
        "score": score(subject.metric, predictions, examples),
        "majority": majority(subject, examples),
        "examples": len(examples),
    }


def predict(
    backbone: str | None, weights: Path | str | None, texts: Sequence[str | Example], task: str | None = None
) -> list[str]:
    """Return one answer for each text: of the task's labels where the task is a classification, else generated.

    The task is the one the weights were tuned for, unless named; texts of a multiple choice task are examples with options.
    """
    plan = setup(backbone, task, weights)
    return _answers(plan, [_example(place, text) for place, text in enumerate(texts)])


def _answers(plan: Setup, examples: list[Example]) -> list[str]:
    import deltatune as dt

    if not examples:
        return []
    backbone = load_for(plan.backbone, plan.recipe.precision)
    codec = Codec(backbone, plan.recipe.max_input, plan.recipe.max_target)
    questions = make_questions(codec, find_task(plan.task), examples) if plan.task else free_questions(codec, examples)
    if plan.weights is not None:
        dt.load(backbone.model, plan.weights)
    return answer(backbone, questions, codec, plan.recipe)


def _example(place: int, text: str | Example) -> Example:
    if isinstance(text, str):
        return Example(str(place), text, "", ())
    # A template words the target too, so a question without an answer gets any of its letters.
    return text if text.target or not text.options else replace(text, target=text.letters[0])


def _run_of(folder: Path | None) -> Run | None:
    path = folder / RUN if folder is not None else None
    if path is None or not path.exists():
        return None
    return Run.of_record(read_json(path))
