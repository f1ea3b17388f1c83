"""`python -m studies.theory [STEP...]`: what is finished is never done again."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from deltatune.errors import DeltaTuneError
from studies.theory import costs, measuring, robustness, training
from studies.theory.plan import Plan
from studies.theory.report import report
from studies.theory.state import State

STEPS: dict[str, Callable[[State, int], None]] = {
    "runs": training.runs,
    "prefix": training.prefix,
    "intrinsic": training.intrinsic,
    "placement": training.placement,
    "size": training.size,
    "control": measuring.control,
    "spectrum": measuring.spectrum,
    "robust": robustness.robust,
    "function": measuring.function,
    "costs": costs.costs,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.theory", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; all without any")
    parser.add_argument("--state", type=Path, default=Path("build/theory"), help="folder of runs and measurements")
    given = parser.parse_args()
    unknown = set(given.steps) - STEPS.keys()
    if unknown:
        raise DeltaTuneError(f"there is no step {sorted(unknown)[0]!r}; write some of {', '.join(STEPS)}.")
    state = State(Plan.read(), given.state)
    for seed in state.plan.seeds:
        for step in given.steps or STEPS:
            STEPS[step](state, seed)
    report(state)


if __name__ == "__main__":
    main()
