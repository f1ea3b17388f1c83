"""Scale: a method at another strength.

    y' = y + s (m(y) - y)

for what the method m makes of y, an output, a hidden state, a weight or a parameter. Parameters: those of m. s = 0 is the bare
backbone, s = -1 the negation of task arithmetic (Ilharco et al., 2023, arXiv:2212.04089).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.method import Method
from deltatune.methods._combined import Combined
from deltatune.methods._mixed import no_heads


@dataclass(frozen=True)
class Scale(Combined):
    """Constant strength: y' = y + by (inner(y) - y) (Ilharco et al., 2023)."""

    inner: Method
    by: float = 1.0

    def __post_init__(self) -> None:
        no_heads(self, "what stands beside the text has no strength; scale its start, or use Gate")

    @property
    def children(self) -> tuple[Method, ...]:
        return (self.inner,)

    def mix(self, p: Any, x: Tensor, before: Tensor, after: list[Tensor]) -> Tensor:
        return before + self.by * (after[0] - before)
