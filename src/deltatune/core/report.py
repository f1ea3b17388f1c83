"""Reports: the measured error of every parameter that a computation on weights has written, and the refusal above a tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deltatune.errors import DeltaTuneError

TOLERANCE = 1e-3  # far above what rounding to float32 does to a change, far below what a wrong formula does


@dataclass(frozen=True)
class Report:
    """The measured error |Delta - exact| / |exact| of every changed parameter, in Frobenius norms, by its path."""

    errors: Mapping[str, float]
    tolerance: float = TOLERANCE

    @property
    def worst(self) -> str:
        """The path of the parameter with the largest error; empty when nothing changes."""
        return max(self.errors, key=lambda name: self.errors[name], default="")

    @property
    def error(self) -> float:
        """The largest error."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        width = max(map(len, self.errors), default=0)
        lines = [f"{name.ljust(width)}  {error:.2e}" for name, error in self.errors.items()]
        return "\n".join([*lines, f"largest error {self.error:.2e}, tolerance {self.tolerance:g}"])


def refuse(report: Report, cure: str) -> None:
    """Raise `DeltaTuneError`, with the cure, when the largest error is above the tolerance."""
    if report.error > report.tolerance or report.error != report.error:
        raise DeltaTuneError(
            f"the result is off by {report.error:.2g} of the exact change at {report.worst!r}, more than the tolerance "
            f"{report.tolerance:g}: {cure}"
        )
