"""What the instruments measure: deltas on one backbone, which is loaded once, and some examples of one task."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

import deltatune as dt
from deltatune import formats
from deltatune.backbones import Backbone, load
from deltatune.core.delta import Delta
from deltatune.core.site import anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError, nearest
from deltatune.files import read_json
from deltatune.formats.hub import local
from deltatune.methods.specification.full import Full
from deltatune.tasks import task as find_task
from deltatune.theory.sides import Batch
from deltatune.tuning.answers import make_rows
from deltatune.tuning.encode import Codec, collate
from deltatune.tuning.precision import HELD
from deltatune.tuning.precision import device as chosen_device
from deltatune.tuning.recipe import Recipe, Run
from deltatune.tuning.run import RESULT, RUN

SPLITS = ("train", "dev")
OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class Sample:
    """Which examples are looked at: so many of a split, drawn with a seed, `batch` at a time.

    Raises `DeltaTuneError` for the test split, which is for the final evaluation alone, and for an unknown one.
    """

    examples: int = 64
    batch: int = 16
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        if self.split == "test":
            raise DeltaTuneError("the test split is read by a final evaluation alone; look at train or dev.")
        if self.split not in SPLITS:
            raise DeltaTuneError(f"there is no split {self.split!r}.{nearest(self.split, SPLITS)} Write train or dev.")
        if self.examples < 1 or self.batch < 1:
            raise DeltaTuneError(f"{self.examples} examples in batches of {self.batch} are none; write 1 or more.")

    def batches(self, backbone: Backbone, task: str, recipe: Recipe) -> list[Batch]:
        """Return the batches, as token ids on the device that computes, each for `model(**batch)`."""
        subject, codec = find_task(task), Codec(backbone, recipe.max_input, recipe.max_target)
        every, device = subject.split(self.split), next(backbone.model.parameters()).device  # pyright: ignore[reportArgumentType]
        rows = make_rows(codec, subject, random.Random(self.seed).sample(every, min(self.examples, len(every))))
        return [collate(rows[i : i + self.batch], codec.pad, device) for i in range(0, len(rows), self.batch)]


@dataclass(frozen=True)
class Source:
    """Where a delta lies, and what is known of how it was made."""

    name: str
    folder: Path
    backbone: str
    task: str | None
    recipe: Recipe


@dataclass(frozen=True)
class Subject:
    """Deltas by the names of their folders, on one backbone, the tasks that they are of, and a sample to take of one."""

    backbone: Backbone
    deltas: Mapping[str, Weights]
    tasks: Sequence[str]
    recipe: Recipe
    sample: Sample

    @property
    def model(self) -> nn.Module:
        """The backbone's model, in evaluation mode, with nothing attached."""
        return self.backbone.model

    @property
    def first(self) -> Weights:
        """The first of the deltas."""
        return next(iter(self.deltas.values()))

    @property
    def task(self) -> str | None:
        """The task, where there is just one."""
        return self.tasks[0] if len(self.tasks) == 1 else None

    @cached_property
    def batches(self) -> list[Batch]:
        """The sample; raises `DeltaTuneError` unless there is one task to take it from."""
        if self.task is None:
            found = (
                f"the deltas are of {', '.join(self.tasks)}"
                if self.tasks
                else "no run.json beside the weights tells it"
            )
            raise DeltaTuneError(f"which task to look at is not known, as {found}; write --task NAME.")
        return self.sample.batches(self.backbone, self.task, self.recipe)

    @property
    def about(self) -> dict[str, str]:
        """The backbone and the deltas, in words."""
        return {"Backbone": self.backbone.name, **{name: str(weights.delta) for name, weights in self.deltas.items()}}

    @property
    def data(self) -> dict[str, str]:
        """What is looked at of the task, in words."""
        count = sum(len(batch["labels"]) for batch in self.batches)
        return {"Data": f"{count} {self.sample.split} examples of {self.task}, drawn with seed {self.sample.seed}"}

    def layer(self, address: str) -> str:
        """Return the block that an address lies in, as a where."""
        for block in anatomy(self.model).blocks:
            if f"{address}.".startswith(f"{block.path}."):
                return f"{block.stack}.block[{block.layer}]".lstrip(".")
        return OUTSIDE


def subject(
    folders: Sequence[Path | str], on: str | None = None, task: str | None = None, sample: Sample | None = None
) -> Subject:
    """Load the backbone and the deltas of folders that tune or a study wrote, or, with `on` and `task`, of any format.

    Raises `DeltaTuneError` for a folder without weights, and for deltas of several backbones.
    """
    sources = [_source(Path(folder), on, task) for folder in folders]
    _check_one({source.name: source.backbone for source in sources})
    first = sources[0]
    dtype, quantised = HELD[first.recipe.precision]
    backbone = load(first.backbone, dtype, quantised)
    backbone.model.to(chosen_device())
    names = _short([source.name for source in sources])
    deltas = {name: formats.read(backbone.model, s.folder) for name, s in zip(names, sources, strict=True)}
    tasks = tuple(dict.fromkeys(source.task for source in sources if source.task))
    return Subject(backbone, deltas, tasks, first.recipe, sample or Sample())


def _short(names: list[str]) -> list[str]:
    """Return the last parts of paths where these tell them apart; raises `DeltaTuneError` for one that is named twice."""
    if len(set(names)) < len(names):
        raise DeltaTuneError(f"{names[0]} is named twice; name two different folders.")
    last = [Path(name).name for name in names]
    return last if len(set(last)) == len(last) else names


def recorded(folder: Path) -> Run | None:
    """Return the run that a folder holds, if it holds one."""
    return Run.of_record(read_json(folder / RUN)) if (folder / RUN).exists() else None


def is_full(delta: Delta | str) -> bool:
    """Whether a delta, or the text of one, is full fine-tuning, of whatever part of the backbone."""
    terms = (dt.parse(delta) if isinstance(delta, str) else delta).terms
    return bool(terms) and all(isinstance(term.method, Full) for term in terms)


def _source(named: Path, on: str | None, task: str | None) -> Source:
    folder = local(named)
    if not folder.exists():
        raise DeltaTuneError(f"there is no folder {folder}; give one that tune wrote.")
    if (folder / "study.json").exists():
        raise DeltaTuneError(f"{folder} holds a whole study; name one of its runs, {folder / 'runs' / 'ID'}.")
    run = recorded(folder)
    if run and not (folder / RESULT).exists():
        raise DeltaTuneError(f"the run in {folder} is not finished; issue the command again that began it.")
    backbone = on or (run.backbone if run else None)
    if backbone is None:
        raise DeltaTuneError(f"{folder} is no run (there is no run.json), so name its backbone: --on BACKBONE.")
    return Source(str(named), folder, backbone, task or (run.task if run else None), run.recipe if run else Recipe())


def _check_one(backbones: Mapping[str, str]) -> None:
    if len(set(backbones.values())) > 1:
        each = ", ".join(f"{name} is of {backbone}" for name, backbone in backbones.items())
        raise DeltaTuneError(
            f"deltas are compared on one backbone, but {each}; compare their scores with `deltatune eval`, or load one backbone "
            "with --on BACKBONE where both fit it."
        )
