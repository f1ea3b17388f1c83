"""Measuring: contestants take turns in one process, and what is reported are medians over rounds.

In every round each contestant runs once, in a random order that the seed fixes, so that a slow moment of the machine
meets all of them; ratios and differences are taken inside a round and only then summarised. The first round is thrown
away. The unit is CPU time of this process: with one thread, wall time without the waiting for other work on the machine.
The garbage collector runs between the turns, not in them, and freed memory stays with the process.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from deltatune.files import write_json, write_text
from deltatune.quiet import quiet
from deltatune.tuning.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
SCRATCH = Path(__file__).resolve().parents[1] / "build" / "benchmarks"
EVERY_LINEAR = "{attn.{q,k,v,o},ffn.{gate,up,down}}"
PEFT_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16
WIDTH = 110  # of a table, where the terminal does not say or is narrower


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Summarise at least two values."""
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(middle, low, high)

    def to_json(self) -> dict[str, float]:
        """Return the three numbers by name."""
        return asdict(self)


@dataclass
class Clock:
    """Seconds per call, by what was measured; one value a round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str, calls: int = 1) -> Iterator[None]:
        """Measure the block, which does the same thing `calls` times."""
        start = time.process_time()
        yield
        elapsed = time.process_time() - start
        self.seconds.setdefault(what, []).append(elapsed / calls)

    def median(self, what: str) -> float:
        """Return the median seconds per call."""
        return statistics.median(self.seconds[what])


def take_turns(
    contestants: Mapping[str, Callable[[Clock], None]], rounds: int, warmup: int = 1, seed: int = 0
) -> dict[str, Clock]:
    """Run every contestant once a round, in random order, and return their clocks; `warmup` more rounds are not kept."""
    order, shuffle = list(contestants), random.Random(seed)
    clocks = {name: Clock() for name in order}
    gc.disable()
    gc.freeze()
    try:
        for turn in range(warmup + rounds):
            if turn == warmup:
                clocks = {name: Clock() for name in order}
            shuffle.shuffle(order)
            for name in order:
                contestants[name](clocks[name])
                gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    return clocks


def ratios(above: list[float], below: list[float]) -> Spread:
    """Summarise the quotients inside each round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def differences(above: list[float], below: list[float]) -> Spread:
    """Summarise the differences inside each round."""
    return Spread.of([a - b for a, b in zip(above, below, strict=True)])


def llama(layers: int, width: int, ffn: int, heads: int, vocabulary: int = 1000) -> nn.Module:
    """Build a Llama of this shape with the same random values each time, in fp32, its key/value cache off."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def peft_lora() -> Any:
    """Return peft's configuration of the same LoRA: every linear of every block, no dropout."""
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=PEFT_LINEARS, task_type="CAUSAL_LM")


def options(about: str) -> tuple[bool, Path]:
    """Read the command line and set one thread, no warnings of others: whether to be quick, and the folder for the results."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: does it run, not how fast")
    parser.add_argument(
        "--out", type=Path, help=f"folder for the results (default: {RESULTS.parent.name}/{RESULTS.name})"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"peft|transformers")
    quiet()
    _keep_memory()
    return given.quick, given.out or (SCRATCH if given.quick else RESULTS)


def _keep_memory() -> None:
    """Let glibc keep freed memory: else what a pass costs depends on which tensor happens to lie at the heap's end."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, ALL = -1, -3, 1 << 30
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, ALL)
        libc.mallopt(M_MMAP_THRESHOLD, ALL)


def machine() -> dict[str, Any]:
    """State where this was measured: versions, commit, processor, threads, and the load of the last minute."""
    return {**environment(), "peft": importlib.metadata.version("peft"), "load": round(os.getloadavg()[0], 2)}


@dataclass(frozen=True)
class Figures:
    """A table for people: a title, column names, and rows of text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def print(self) -> None:
        """Show the table on the terminal."""
        table = Table(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        Console(width=max(WIDTH, Console().width)).print(table)

    def markdown(self) -> str:
        """Return the table as Markdown, numbers to the right."""
        rule = ["---", *("---:" for _ in self.columns[1:])]
        lines = [" | ".join(cells) for cells in (self.columns, rule, *self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


def publish(name: str, folder: Path, result: dict[str, Any], tables: list[Figures]) -> None:
    """Print the tables, and write `<name>.json` and `<name>.md` into `folder`."""
    for table in tables:
        table.print()
    write_json(folder / f"{name}.json", {"benchmark": name, **result})
    write_text(folder / f"{name}.md", "\n".join([*(t.markdown() for t in tables), _statement(result)]))
    Console().print(f"written: {folder / name}.json and {name}.md")


def _statement(result: dict[str, Any]) -> str:
    at = result["machine"]
    versions = ", ".join(f"{name} {at[name]}" for name in ("deltatune", "torch", "transformers", "peft"))
    commit = (at["git"] or "unknown")[:10] + (" with changes" if at["dirty"] else "")
    threads = f"{at['threads']} thread{'s' if at['threads'] > 1 else ''} of {at['cores']} cores"
    return (
        f"CPU time, {result['rounds']} interleaved rounds, median [quartiles]; {at['cpu']}, {threads}, load {at['load']}; "
        f"{versions}; commit {commit}.\n"
    )


def show(spread: Spread, digits: int = 2) -> str:
    """Return `median [low-high]`."""
    return f"{spread.median:.{digits}f} [{spread.low:.{digits}f}-{spread.high:.{digits}f}]"
