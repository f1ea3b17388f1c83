"""Stack: several methods at one site, each on what the one before it made (AdapterStack in MAD-X: Pfeiffer et al., 2020, arXiv:2005.00052).

    y' = m_n(... m_2(m_1(y)))

Parameters: those of all m_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.method import Method
from deltatune.errors import DeltaTuneError
from deltatune.methods._combined import Combined
from deltatune.methods._mixed import some


@dataclass(frozen=True)
class Stack(Combined):
    """One after the other: y' = m_n(... m_1(y)) (Pfeiffer et al., 2020)."""

    methods: tuple[Method, ...]

    def __post_init__(self) -> None:
        some(self)
        if self.acts not in ("stream", "tensor", "branch"):
            raise DeltaTuneError(
                f"Stack puts methods on hidden states or parameters in a row, not {self.methods[0]}; write a + b."
            )

    @property
    def children(self) -> tuple[Method, ...]:
        return self.methods

    def stream(self, p: Any, h: Tensor) -> Tensor:
        for method, q in self._kids(p):
            h = method.stream(q, h)
        return h

    def value(self, p: Any, theta: Tensor) -> Tensor:
        for method, q in self._kids(p):
            theta = method.value(q, theta)
        return theta

    def output(self, p: Any, x: Tensor, y: Tensor, *base: Any) -> Tensor:
        for method, q in self._kids(p):
            y = method.output(q, x, y)
        return y
