"""A task: its examples by split, its labels, its metric and the template that words it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal, Protocol

from deltatune.errors import DeltaTuneError, nearest
from deltatune.tasks.example import SPLITS, Example, Kind, Split
from deltatune.tasks.template import Prompt, Template


class Source(Protocol):
    """Where a task's examples come from."""

    def read(self, split: Split) -> list[Example]:
        """Read the examples of one split, checked."""
        ...


@dataclass(frozen=True)
class Task:
    """What to learn: examples in three splits, the labels (none for generation), the metric and the template.

    `digest` identifies the examples (sha256), so a result can say what it was measured on. Splits are read when they
    are asked for and then kept; the test examples exist in memory only after `split("test")`.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    metric: str
    definition: str
    category: str
    licence: str
    version: str
    digest: str
    template: Template
    source: Source = field(repr=False, compare=False)
    _splits: dict[str, list[Example]] = field(default_factory=dict, init=False, repr=False, compare=False, hash=False)

    def split(self, name: Split) -> list[Example]:
        """Return the examples of a split; raises `DeltaTuneError` on an unknown name, a bad record or no examples."""
        if name not in SPLITS:
            raise DeltaTuneError(f"unknown split {name!r}; a task has train, dev and test.{nearest(name, SPLITS)}")
        if name not in self._splits:
            examples = self.source.read(name)
            if not examples:
                raise DeltaTuneError(f"task {self.name!r} has no {name} examples; add records with split {name!r}.")
            self._splits[name] = examples
        return list(self._splits[name])

    def few_shot(self, k: int, seed: int) -> list[Example]:
        """Return k train examples per label (of the whole task when it is generation), chosen by the seed.

        The choice depends on nothing but the seed and the ids, and the k examples are among the k + 1 of the same seed.
        Raises `DeltaTuneError` when a label has fewer than k.
        """
        if k < 1:
            raise DeltaTuneError(f"few_shot needs k of 1 or more; found {k}.")
        taken: dict[str, int] = dict.fromkeys(self.labels or ("",), 0)
        chosen: list[Example] = []
        for example in sorted(self.split("train"), key=lambda example: _rank(seed, example.id)):
            label = example.target if self.labels else ""
            if taken[label] < k:
                taken[label] += 1
                chosen.append(example)
        short, count = min(taken.items(), key=lambda item: item[1])
        if count < k:
            of = f"label {short!r} has" if self.labels else "it has"
            raise DeltaTuneError(
                f"task {self.name!r} cannot give {k} shots: {of} {count} train examples; write a k of at most {count}."
            )
        return chosen

    def candidates(self, example: Example) -> list[str]:
        """Return the possible targets: the labels, the letters of a multiple choice example, none for generation."""
        return list(example.letters or self.labels)

    def texts(self, example: Example) -> list[str]:
        """Return the text to score for each candidate, in the same order, as the template words it."""
        return [self.template.verbalize(candidate, example) for candidate in self.candidates(example)]

    def prompt(self, example: Example, backbone: Literal["causal", "seq2seq", "masked"] = "causal") -> Prompt:
        """Return the prompt of an example for a kind of backbone, in the task's template."""
        return self.template.fit(backbone).render(example, self.definition)


def _rank(seed: int, identity: str) -> str:
    return hashlib.sha256(f"{seed}/{identity}".encode()).hexdigest()
