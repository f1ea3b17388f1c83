"""UniPELT's gate: each input decides how much a method counts (Mao et al., 2022, arXiv:2110.07577).

    y' = y + g(x) (m(y) - y)        g(x) = sigmoid(x w^T + b)        w: [1, d]   b: [1]

one gate a token. w and b start at zero, so that half of the method counts. Parameters: d + 1 a site, and those of m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Leaf
from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.methods._combined import Combined
from deltatune.methods._mixed import no_heads


@dataclass(frozen=True)
class Gate(Combined):
    """Gated method: y' = y + sigmoid(x w^T + b) (inner(y) - y) (Mao et al., 2022)."""

    inner: Method

    def __post_init__(self) -> None:
        no_heads(self, "the gate looks at outputs and hidden states")

    @property
    def children(self) -> tuple[Method, ...]:
        return (self.inner,)

    @property
    def breaks(self) -> Any:  # type: ignore[override]
        """The laws of the inner method, and merging: the gate depends on the input."""
        return {**super().breaks, "merge": "how much it counts depends on the input, which no weight can express"}

    def own(self, site: Site) -> dict[str, Leaf]:
        width = site.width if self.acts == "stream" else site.d_in
        return {"w": Leaf((1, width)), "b": Leaf((1,))}

    def mix(self, p: Any, x: Tensor, before: Tensor, after: list[Tensor]) -> Tensor:
        return before + torch.sigmoid(F.linear(x, p.w, p.b)) * (after[0] - before)
