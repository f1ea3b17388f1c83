"""The instruments as they are asked for by name: each makes of a subject one exhibit, with settings that have defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from deltatune.theory.subject import Sample, Subject, subject

__all__ = ["MEASURE", "OF_A_RUN", "control", "full_run", "gap", "intrinsic", "landscape", "size", "spectrum"]

# Those that look at a finished run; the intrinsic dimension trains runs of its own.
OF_A_RUN: dict[str, Callable[[Subject], Exhibit]] = {
    "control": control,
    "gap": gap,
    "landscape": landscape,
    "size": size,
    "spectrum": spectrum,
}
REFUSED = "refused"


@dataclass(frozen=True)
class Measure:
    """Instruments for the finished runs of a study, which load a run's backbone once for all of them."""

    instruments: Mapping[str, Callable[[Subject], Exhibit]]
    sample: Sample

    @property
    def names(self) -> Sequence[str]:
        """The names of the instruments."""
        return tuple(self.instruments)

    def __call__(self, folder: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each instrument's name and what it found in a finished run, as JSON, or the reason for which it refused."""
        found = subject([folder], sample=self.sample)
        for name in names:
            try:
                yield name, self.instruments[name](found).to_json()
            except DeltaTuneError as error:
                yield name, {"instrument": name, REFUSED: str(error)}


MEASURE = Measure(OF_A_RUN, Sample(examples=32))
