"""Run benchmarks: `python -m benchmarks [NAME ...] [--quick] [--device cpu|cuda] [--out FOLDER]`, all of them without a name."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.benchmark import RESULTS, SCRATCH, all_benchmarks, find
from benchmarks.measure import TIMERS
from benchmarks.page import DOCS, document, pages, show_on_terminal
from benchmarks.results import keep


def main() -> None:
    """Measure, each benchmark in a process of its own, and write the results and the page that shows them."""
    given = options()
    out: Path = given.out or (SCRATCH if given.quick else RESULTS)
    if given.child:
        return alone(given.names[0], given.quick, given.device, out / f"{given.device}.json")
    failed = [name for name in given.names or all_benchmarks() if not in_a_process(name, given, out)]
    written = pages(out)
    if out == RESULTS:
        document(DOCS, RESULTS)
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
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(name: str, given: argparse.Namespace, out: Path) -> bool:
    """Run one benchmark where no other has left memory, threads or caches behind; returns whether it went well."""
    started = time.monotonic()
    flags = ["--child", "--device", given.device, "--out", str(out), *(["--quick"] if given.quick else [])]
    done = subprocess.run([sys.executable, "-m", "benchmarks", name, *flags])
    Console().print(f"{name}: {time.monotonic() - started:.0f} s\n")
    return done.returncode == 0


def alone(name: str, quick: bool, device: str, path: Path) -> None:
    """Run one benchmark in this process."""
    benchmark = find(name)
    if benchmark is None:
        sys.exit(f"benchmarks/{name}.py has no BENCHMARK. There are {', '.join(all_benchmarks())}.")
    result = benchmark.run(quick, device)
    keep(path, name, result)
    show_on_terminal(benchmark, result)


if __name__ == "__main__":
    main()
