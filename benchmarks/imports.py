"""What it costs to begin: importing the library, and its command line.

Each is a Python process of its own, with the files in the system's cache; what is told is the CPU time of the whole process,
also on a machine with a GPU. `import deltatune` looks names up when they are first used, so the names of a usual session
are also imported in one go. What is extra is the time over the floor, which is torch for what cannot do without it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.benchmark import Benchmark, Result, Table
from benchmarks.measure import Clock, Turn, differences, show
from benchmarks.plots import Bars, Plot
from benchmarks.shape import Shape

NOTHING, TORCH, HELP = "python", "import torch", "deltatune --help"
# name: (what Python is asked to do, over which floor)
STARTS: dict[str, tuple[tuple[str, ...], str]] = {
    NOTHING: (("-c", "pass"), NOTHING),
    TORCH: (("-c", "import torch"), NOTHING),
    "import deltatune": (("-c", "import torch, deltatune"), TORCH),
    "LoRA, attach and save of deltatune": (
        ("-c", "import torch\nfrom deltatune import LoRA, attach, save"),
        TORCH,
    ),
    "LoraConfig and get_peft_model of peft": (
        ("-c", "import torch\nfrom peft import LoraConfig, get_peft_model"),
        TORCH,
    ),
    HELP: (("-m", "deltatune.cli", "--help"), NOTHING),
}


@dataclass(frozen=True, kw_only=True)
class Starts(Shape):
    """How often which processes are started, those that are a floor among them."""

    names: tuple[str, ...] = tuple(STARTS)


def starting(arguments: tuple[str, ...]) -> Turn:
    """Run Python and take the CPU time of the process that it was; what it says is shown where it fails."""

    def turn(clock: Clock) -> None:
        before = _of_children()
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        clock.add("start", _of_children() - before)
        if done.returncode != 0:
            raise RuntimeError(f"python {' '.join(arguments)}: {done.stderr}")

    return turn


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(shape: Starts) -> Result:
    """Start everything in turns; rows with `what`, `seconds` (median), the `floor`, and `extra` seconds over it."""
    took = shape.turns({what: starting(STARTS[what][0]) for what in shape.names})
    seconds = {what: took[what].seconds["start"] for what in shape.names}
    rows = [
        {
            "what": what,
            "seconds": took[what].median("start"),
            "floor": STARTS[what][1],
            "extra": differences(seconds[what], seconds[STARTS[what][1]]).to_json(),
        }
        for what in shape.names
    ]
    return {"starts": rows}


def tables(result: Result) -> list[Table]:
    """Return what each process takes."""
    rows = [(r["what"], f"{r['seconds']:.2f} s", f"{show(r['extra'])} s", r["floor"]) for r in result["starts"]]
    return [Table("A process that imports and ends", ("", "whole", "extra", "over"), rows)]


def plots(result: Result) -> list[Plot]:
    """Return what each takes beyond its floor."""
    return [Bars("Beyond the floor", {r["what"]: r["extra"]["median"] for r in result["starts"][1:]}, " s")]


BENCHMARK = Benchmark(
    full=Starts(rounds=7),
    quick=Starts(rounds=2, names=(NOTHING, HELP)),
    measure=measure,
    tables=tables,
    plots=plots,
)
