"""Average: several methods at one site, each with an equal share (AdapterSoup: Chronopoulou et al., 2023, arXiv:2302.07027).

    y' = (1/n) sum_i m_i(y)

Parameters: those of all m_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.method import Method
from deltatune.methods._combined import Combined
from deltatune.methods._mixed import no_heads, some


@dataclass(frozen=True)
class Average(Combined):
    """Equal shares: y' = mean_i m_i(y) (Chronopoulou et al., 2023)."""

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        some(self)
        no_heads(self, "what stands beside the text is not averaged but put in a row; write a + b")

    @property
    def children(self) -> tuple[Method, ...]:
        return self.methods

    def mix(self, p: Any, x: Tensor, before: Tensor, after: list[Tensor]) -> Tensor:
        return sum(after[1:], after[0]) / len(after)
