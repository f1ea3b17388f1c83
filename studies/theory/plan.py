"""The plan of the study, read from its file, and the runs that it asks for."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log, sqrt
from pathlib import Path
from typing import Any

from deltatune.tuning import Recipe, Run

FILE = Path(__file__).with_name("plan.toml")


@dataclass(frozen=True)
class Choice:
    """A delta and its learning rate."""

    delta: str
    lr: float


@dataclass(frozen=True)
class Plan:
    """What the file says."""

    backbone: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: Recipe
    methods: Mapping[str, Choice]
    search: Mapping[str, Any]
    intrinsic: Mapping[str, Any]
    placement: Mapping[str, Any]
    size: Mapping[str, Any]
    robust: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path = FILE) -> Plan:
        """Return the plan of a file."""
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        methods = {name: Choice(**choice) for name, choice in data.pop("methods").items()}
        recipe = Recipe.from_json(data.pop("recipe"))
        tasks, seeds = tuple(data.pop("tasks")), tuple(data.pop("seeds"))
        return cls(tasks=tasks, seeds=seeds, recipe=recipe, methods=methods, **data)

    def run(self, choice: Choice, task: str, seed: int, **changes: Any) -> Run:
        """Return a run of the plan's recipe at the choice's rate, with changes to the recipe."""
        return Run(choice.delta, self.backbone, task, replace(self.recipe, lr=choice.lr, **changes), seed)

    def searched(self) -> dict[str, list[tuple[Choice, Run]]]:
        """Return the runs of the search, by what they choose for."""
        found = {}
        for name, candidates in self.search["candidates"].items():
            choices = [Choice(**candidate) for candidate in candidates]
            task, steps = self.search["task"], self.search["steps"]
            found[name] = [(c, self.run(c, task, 0, steps=steps, test=False)) for c in choices]
        return found

    def ranks(self, task: str, seed: int) -> dict[int, Run]:
        """Return the runs of LoRA by rank, the method's own among them."""
        choices = {rank: Choice(f"LoRA(rank={rank})", self.size["lr"]) for rank in self.size["ranks"]}
        found = {rank: self.run(choice, task, seed, test=False) for rank, choice in choices.items()}
        return dict(sorted((found | {8: self.run(self.methods["LoRA"], task, seed)}).items()))

    def longer(self, prefix: Choice, task: str, seed: int) -> Run:
        """Return the run of the prefix whose loop is closed."""
        steps = self.robust["steps"]
        return self.run(prefix, task, seed, steps=steps, eval_every=steps // 3)

    def placed(self, text: str, task: str, seed: int) -> Run:
        """Return the run of a placed delta, of which nothing is chosen and only the end counts."""
        return self.run(Choice(text, self.placement["lr"]), task, seed, eval_every=0)

    def swept(self, task: str, seed: int, rates: Mapping[int, float]) -> list[Run]:
        """Return the runs of SAID by dimension, at the rates that were found for some dimensions."""
        recipes = self._recipes(rates).items()
        return [replace(self.full(task, seed), delta=f"SAID(dim={d})", recipe=recipe) for d, recipe in recipes]

    def full(self, task: str, seed: int) -> Run:
        """Return the run of full fine-tuning."""
        return self.run(self.methods["Full"], task, seed)

    def _recipes(self, rates: Mapping[int, float]) -> dict[int, Recipe]:
        once = {"eval_every": self.recipe.steps, "test": False}
        found = {}
        for d in self.intrinsic["dims"]:
            near = min(rates, key=lambda at, d=d: abs(log(at / d)))
            found[d] = replace(self.recipe, lr=float(f"{rates[near] * sqrt(near / d):.3g}"), **once)
        return found
