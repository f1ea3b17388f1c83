"""What a whole training costs, end to end, against transformers' Trainer with peft.

Both load the backbone, tokenise the texts, train the same LoRA (rank 8, every linear of every block) and save it, each in a
process of its own. They see the same examples once, in batches of the same size, at the same learning rate, falling linearly; no
evaluation, no checkpoint before the end. deltatune is told to hold the frozen backbone in bf16 (`precision = "bf16"`). Trainer
and peft are taken as they come, and, told separately ("tuned"), with `group_by_length`
and `bf16` on. As it comes, transformers loads a
backbone in the float type that it is stored in: `t5-seed` in bf16, the fresh Llama in fp32. What `t5-seed` costs held in fp32, as a
backbone that is stored so would be, is told too.

`t5-seed` is a T5 of 10 M parameters; the Llama has four blocks of width 768, fresh weights of a fixed seed, and the tokenizer of
`stories260k`. The tasks are four classifications, two multiple choices and two generations, of short and of long texts.

Time is CPU time of one thread, from before the backbone is loaded to after the weights are saved. Memory is what the process holds
at its peak beyond what it holds with everything imported (torch, transformers, peft), files not counted. The loss is that of 64
dev examples, per token, measured in fp32 from what was saved; its change against the other way is to be read beside the spread of
the seeds, the larger one of both, and on the mean of tasks and seeds beside its standard error. Each finished training is kept
until all are done, so that a run which was broken off goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from benchmarks.benchmark import SCRATCH, Benchmark, Result, Table
from benchmarks.plots import Bars, Plot
from benchmarks.runs import FP32, OURS, PEER, TUNED, Job, do, write_part
from benchmarks.shape import Shape as Common
from deltatune.files import read_json, write_json
from deltatune.tuning.environment import environment

LLAMA = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
}
TOKENIZER = "stories260k"
PLACE = SCRATCH / "end_to_end"
ALL = "all"  # backbones together


@dataclass(frozen=True)
class Model:
    """A backbone (`llama`: the shape above), how many examples it is trained on, how long their inputs may be, and in which ways."""

    name: str
    examples: int
    max_input: int
    ways: tuple[str, ...] = (OURS, PEER, TUNED)


@dataclass(frozen=True, kw_only=True)
class Shape(Common):
    """Which backbones on which tasks; a round is a seed."""

    models: tuple[Model, ...]
    tasks: tuple[str, ...]
    batch: int = 8

    def jobs(self, folder: Path) -> Iterator[tuple[str, str, Job]]:
        """Yield every training with its model's and its task's name; the ways take turns."""
        for model in self.models:
            backbone = write_llama(folder / "llama") if model.name == "llama" else model.name
            for name in self.tasks:
                part = write_part(name, folder / "tasks" / f"{model.name} {name}", model.examples)
                steps = model.examples // self.batch
                for seed in range(self.rounds):
                    for who in model.ways:
                        yield (
                            model.name,
                            name,
                            Job(who, backbone, part, seed, steps, self.batch, model.max_input, self.device),
                        )


def write_llama(folder: Path) -> str:
    """Write what a fresh Llama is built from, its configuration and its tokenizer, and return its name."""
    source = Path(os.environ.get("DELTATUNE_MODELS", "../shared/models")) / TOKENIZER
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name != "config.json" and not path.name.endswith(".safetensors"):
            shutil.copy(path, folder)
    write_json(folder / "config.json", {**read_json(source / "config.json"), **LLAMA})
    return f"random:{folder}"


def measure(shape: Shape) -> Result:
    """Do what is not done yet, and compare."""
    at = environment()
    code = json.dumps([at["git"], at["dirty"], at["torch"], at["transformers"]])
    kept, rows = PLACE / "done", []
    for model, name, job in shape.jobs(PLACE):
        key = hashlib.sha256(f"{job}{code}{shape}".encode()).hexdigest()[:16]
        path = kept / f"{key}.json"
        if not path.exists():
            write_json(path, do(job))
        rows.append({"model": model, "task": name, "who": job.who, "seed": job.seed, **read_json(path)})
    shutil.rmtree(kept)
    return {"rows": rows, "pairs": [_pair(rows, *key) for key in _keys(rows)]}


def _keys(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((row["model"], row["task"], row["who"]) for row in rows if row["who"] != OURS))


def _pair(rows: list[dict[str, Any]], model: str, name: str, who: str) -> dict[str, Any]:
    """Compare deltatune with another way on one task: how many times the time and the memory, and how the losses differ."""
    ours, theirs = (
        [row for row in rows if (row["model"], row["task"], row["who"]) == (model, name, one)] for one in (OURS, who)
    )
    losses = [[row["loss"] for row in own] for own in (ours, theirs)]
    return {
        "model": model,
        "task": name,
        "over": who,
        **{f"{what}_ratio": _times(theirs, ours, what) for what in ("seconds", "wall", "bytes")},
        "loss": fmean(losses[0]),
        "loss_difference": fmean(losses[0]) - fmean(losses[1]),
        "loss_spread": max(stdev(own) for own in losses),
    }


def _times(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], what: str) -> float:
    return median(row[what] for row in theirs) / median(row[what] for row in ours)


def tables(result: Result) -> list[Table]:
    """Return what it comes to for each backbone, and every task."""
    pairs = result["pairs"]
    ways = list(dict.fromkeys((pair["model"], pair["over"]) for pair in pairs))
    models = {model for model, _ in ways}
    shared = dict.fromkeys(over for _, over in ways if models == {model for model, one in ways if one == over})
    whole = [_summary(result, *way) for way in [*ways, *((ALL, over) for over in shared if len(models) > 1)]]
    single = [
        (
            f"{pair['model']}, {pair['task']}: {pair['over']}",
            f"{pair['seconds_ratio']:.2f}",
            f"{pair['bytes_ratio']:.2f}",
            f"{pair['loss']:.3f}",
            f"{pair['loss_difference']:+.3f}",
            f"{pair['loss_spread']:.3f}",
        )
        for pair in pairs
    ]
    columns = ("", "time", "memory")
    return [
        Table("Another way / deltatune, geometric mean over the tasks (range)", (*columns, "change of loss"), whole),
        Table("Another way / deltatune, task by task", (*columns, "loss", "change", "spread"), single),
    ]


def _summary(result: Result, model: str, over: str) -> tuple[str, ...]:
    """Return the row of one backbone, or of all, against another way."""
    pairs, rows = ([one for one in result[kind] if model in (one["model"], ALL)] for kind in ("pairs", "rows"))
    own = [pair for pair in pairs if pair["over"] == over]
    times, memory = ([pair[f"{what}_ratio"] for pair in own] for what in ("seconds", "bytes"))
    changes = _changes(rows, over)
    error = stdev(changes) / math.sqrt(len(changes))
    loss = f"{fmean(changes):+.3f} ± {error:.3f}"
    return (f"{model}: {over}", *map(_mean_and_range, (times, memory)), loss)


def _changes(rows: list[dict[str, Any]], over: str) -> list[float]:
    """Return how much higher deltatune's loss is than another way's, for each backbone, task and seed."""
    losses = {(row["who"], row["model"], row["task"], row["seed"]): row["loss"] for row in rows}
    return [loss - losses[over, *key] for (who, *key), loss in losses.items() if who == OURS]


def _mean_and_range(values: list[float]) -> str:
    return f"{math.exp(fmean(map(math.log, values))):.2f} ({min(values):.2f}-{max(values):.2f})"


def plots(result: Result) -> list[Plot]:
    """Return time and memory of the others in units of deltatune's."""
    labels = {f"{p['model']} {p['task']}": p for p in result["pairs"] if p["over"] == PEER}
    return [
        Bars(f"{what}, {PEER} / deltatune", {label: pair[f"{key}_ratio"] for label, pair in labels.items()})
        for what, key in {"Time": "seconds", "Memory": "bytes"}.items()
    ]


TASKS = (
    "glue-sst2",
    "ag_news",
    "glue-rte",
    "boolq",
    "arc_easy",
    "commonsense_qa",
    "e2e_nlg",
    "aeslc_subject",
)
BENCHMARK = Benchmark(
    full=Shape(
        rounds=2, models=(Model("t5-seed", 240, 256, (OURS, PEER, TUNED, FP32)), Model("llama", 80, 128)), tasks=TASKS
    ),
    quick=Shape(rounds=2, models=(Model("pebble", 16, 32),), tasks=("topic",)),
    measure=measure,
    tables=tables,
    plots=plots,
)
