"""The instruments as they are asked for by name: each makes of a subject one exhibit, with settings that have defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deltatune.errors import DeltaTuneError
from deltatune.theory.exhibit import Exhibit
from deltatune.theory.instruments.control import control
from deltatune.theory.instruments.gap import gap
from deltatune.theory.instruments.intrinsic import full_run, intrinsic
from deltatune.theory.instruments.landscape import landscape
from deltatune.theory.instruments.size import size
from deltatune.theory.instruments.spectrum import spectrum
from deltatune.theory.subject import Subject, subject

__all__ = ["OF_A_RUN", "control", "full_run", "gap", "intrinsic", "landscape", "measure", "size", "spectrum"]

# Those that look at a finished run; the intrinsic dimension trains runs of its own.
OF_A_RUN: dict[str, Callable[[Subject], Exhibit]] = {
    "control": control,
    "gap": gap,
    "landscape": landscape,
    "size": size,
    "spectrum": spectrum,
}
REFUSED = "refused"


def measure(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each instrument's name and what it found in a finished run, as JSON, or the reason for which it refused."""
    found = subject([folder])
    for name in names:
        try:
            yield name, OF_A_RUN[name](found).to_json()
        except DeltaTuneError as error:
            yield name, {"instrument": name, REFUSED: str(error)}
