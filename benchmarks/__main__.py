"""Run benchmarks: `python -m benchmarks [NAME ...] [--quick] [--device cpu|cuda] [--out FOLDER]`, all of them without a name."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.benchmark import RESULTS, SCRATCH, Benchmark, all_benchmarks
from benchmarks.measure import TIMERS
from benchmarks.page import DOCS, document, pages, show_on_terminal
from benchmarks.store import keep


def main() -> None:
    """Measure, each benchmark in a process of its own, and write the results and the page that shows them."""
    given = options()
    known = all_benchmarks()
    for name in given.names:
        if name not in known:
            sys.exit(f"there is no benchmark {name!r}; there are {', '.join(known)}.")
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use here; leave --device away.")
    out: Path = (given.out or (SCRATCH if given.quick else RESULTS)).resolve()
    names = given.names or list(known)
    if given.here:
        for name in names:
            measure(known[name], given.quick, given.device, out)
        return
    failed = [name for name in names if not in_a_process(name, given.quick, given.device, out)]
    written = [*pages(out), *([document(DOCS, RESULTS)] if out == RESULTS else [])]
    Console().print(*(f"written: {path}" for path in written), sep="\n")
    if failed:
        sys.exit(f"these benchmarks failed: {', '.join(failed)}")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time deltatune against others.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which benchmarks; all of them without a name")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few rounds: does it run, not how fast")
    parser.add_argument("--device", choices=TIMERS, default="cpu", help="where the models are (default: cpu)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.add_argument("--here", action="store_true", help="in this process, and write no page")
    return parser.parse_args()


def in_a_process(name: str, quick: bool, device: str, out: Path) -> bool:
    """Run one benchmark where no other has left memory, threads or caches behind; returns whether it went well."""
    started = time.monotonic()
    flags = ["--here", "--device", device, "--out", str(out), *(["--quick"] if quick else [])]
    done = subprocess.run([sys.executable, "-m", "benchmarks", name, *flags])
    Console().print(f"{name}: {time.monotonic() - started:.0f} s\n")
    return done.returncode == 0


def measure(benchmark: Benchmark[Any], quick: bool, device: str, out: Path) -> None:
    """Run one benchmark in this process."""
    result = benchmark.run(quick, device)
    keep(out / f"{device}.json", benchmark.name, result)
    show_on_terminal(benchmark, result)


if __name__ == "__main__":
    main()
