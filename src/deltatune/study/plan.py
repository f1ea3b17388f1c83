"""A study as a value: methods x backbones x tasks x seeds, one recipe, and one search budget that is equal for every method."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from deltatune.tuning import Recipe, Run

DevScores = Mapping["Run", "float | None"]


@dataclass(frozen=True)
class MethodPlan:
    """One method of a study: its delta in canonical text and as `written`, and the recipe settings it alone uses."""

    delta: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    written: str = field(default="", compare=False)


@dataclass(frozen=True)
class Block:
    """Backbones crossed with tasks, and the recipe settings that only this block uses."""

    backbones: tuple[str, ...]
    tasks: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """Learning rates to try before the final runs: equally many for every method, on the same tasks and the same seed."""

    lr: Mapping[str, tuple[float, ...]]
    tasks: tuple[str, ...]
    steps: int
    seed: int


@dataclass(frozen=True)
class Entry:
    """A run and its place in the study; `part` is "search" for a candidate that is judged on dev only."""

    run: Run
    method: str
    part: Literal["search", "final"]


@dataclass(frozen=True)
class Cell:
    """One number of a study's tables: a method on a backbone and a task with one seed."""

    method: str
    backbone: str
    task: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """Everything that a study does; equal plans give equal runs, whatever the order of keys in the file.

    `theory` names the instruments that measure each final run when it is done; it is no part of a run.
    """

    name: str
    methods: Mapping[str, MethodPlan]
    blocks: tuple[Block, ...]
    seeds: tuple[int, ...]
    recipe: Recipe
    search: Search | None = None
    baseline: str | None = None
    text: str = ""
    theory: tuple[str, ...] = ()

    @staticmethod
    def read(path: Path | str) -> Plan:
        """Read a TOML plan; raises `DeltaTuneError` that names the line, the table and the key of a mistake."""
        from deltatune.study.toml import read_plan

        return read_plan(Path(path))

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks in the order of the plan, those used only by the search last."""
        names = [task for block in self.blocks for task in block.tasks]
        return tuple(dict.fromkeys([*names, *(self.search.tasks if self.search else ())]))

    @property
    def backbones(self) -> tuple[str, ...]:
        """All backbones in the order of the plan."""
        return tuple(dict.fromkeys(name for block in self.blocks for name in block.backbones))

    def runs(self, dev: DevScores | None = None) -> list[Entry]:
        """The runs known so far, in the order to do them: the search, then the final runs whose learning rate is decided.

        `dev` maps each finished search run to its dev score, None for a failed one. Seeds vary slowest, so that
        an unfinished study already holds whole tables.
        """
        final = [self._entry(cell, block, lr) for cell, block, lr in self._decided(dev or {})]
        return [*self.search_runs(), *final]

    def search_runs(self) -> list[Entry]:
        """The candidates of the search, in the order to try them; empty when the plan has no search."""
        if self.search is None:
            return []
        return [
            self._candidate(method, backbone, task, block, lr)
            for block in self.blocks
            for backbone in block.backbones
            for task in self.search.tasks or block.tasks
            for method in self.methods
            for lr in self.search.lr[method]
        ]

    def cells(self) -> Iterator[tuple[Cell, Block]]:
        """Every number that the finished study has, with the block it comes from."""
        for seed in self.seeds:
            for block in self.blocks:
                for backbone in block.backbones:
                    for task in block.tasks:
                        for method in self.methods:
                            yield Cell(method, backbone, task, seed), block

    def total_steps(self) -> int:
        """Training steps of the whole study, as the measure of progress."""
        searched = sum(entry.run.recipe.steps for entry in self.search_runs())
        return searched + sum(
            self._settings(cell.method, block).get("steps", self.recipe.steps) for cell, block in self.cells()
        )

    def candidates(self, cell: Cell, block: Block) -> dict[float, list[Entry]]:
        """The search runs that decide the learning rate of a cell, by learning rate."""
        if self.search is None:
            return {}
        tasks = self.search.tasks or (cell.task,)
        return {
            lr: [self._candidate(cell.method, cell.backbone, task, block, lr) for task in tasks]
            for lr in self.search.lr[cell.method]
        }

    def choose(self, cell: Cell, block: Block, dev: DevScores) -> float | None:
        """The learning rate with the best mean dev score (the lower one of equals); None while undecided or if all failed."""
        means: dict[float, float] = {}
        for lr, entries in self.candidates(cell, block).items():
            if any(entry.run not in dev for entry in entries):
                return None
            scores = [score for entry in entries if (score := dev[entry.run]) is not None]
            if len(scores) == len(entries):
                means[lr] = sum(scores) / len(scores)
        return min(means, key=lambda lr: (-means[lr], lr)) if means else None

    def undecided(self, dev: DevScores) -> list[Cell]:
        """The cells that have no run yet, because their search is not finished or all its candidates failed."""
        if self.search is None:
            return []
        return [cell for cell, block in self.cells() if self.choose(cell, block, dev) is None]

    def _decided(self, dev: DevScores) -> Iterator[tuple[Cell, Block, float | None]]:
        for cell, block in self.cells():
            lr = self.choose(cell, block, dev)
            if self.search is None or lr is not None:
                yield cell, block, lr

    def _entry(self, cell: Cell, block: Block, lr: float | None) -> Entry:
        chosen = {} if lr is None else {"lr": lr}
        return Entry(self._run(cell, {**self._settings(cell.method, block), **chosen}), cell.method, "final")

    def _candidate(self, method: str, backbone: str, task: str, block: Block, lr: float) -> Entry:
        search = self.search
        assert search is not None
        settings = {**self._settings(method, block), "lr": lr, "steps": search.steps, "test": False}
        return Entry(self._run(Cell(method, backbone, task, search.seed), settings), method, "search")

    def _settings(self, method: str, block: Block) -> dict[str, Any]:
        return {**block.recipe, **self.methods[method].recipe}

    def _run(self, cell: Cell, settings: Mapping[str, Any]) -> Run:
        from deltatune.tuning import Run

        recipe = dataclasses.replace(self.recipe, **settings)
        return Run(self.methods[cell.method].delta, cell.backbone, cell.task, recipe, cell.seed)
