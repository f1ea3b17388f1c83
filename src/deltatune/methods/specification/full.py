"""Full and last-layer fine-tuning: the baselines, as deltas (Ding et al., 2022, sections 2 and 5.3; Lee et al., 2019).

    theta' = value        value: the shape of theta

`value` starts as a copy of theta, so the delta starts neutral. Parameters: all those of the places it is put at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Copy, Leaf
from deltatune.core.method import OnTensor
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class Full(OnTensor):
    """Fine-tuning: every parameter of the chosen places, by default of the whole backbone, gets a new value."""

    where = "path:**"

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"value": Leaf(site.shape, Copy())}

    def value(self, p: Any, theta: Tensor) -> Tensor:
        return p.value


@dataclass(frozen=True)
class LastLayers(Full):
    """Fine-tuning of the last blocks of every stack: cheap, and the weakest place (Ding et al., 2022, section 5.3)."""

    layers: int = 1

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise DeltaTuneError(f"LastLayers(layers={self.layers}) trains nothing; write at least 1.")

    @property
    def where(self) -> str:  # type: ignore[override]
        """The last `layers` blocks."""
        return f"block[-{self.layers}:]"
