"""Mixture: a router weighs several methods for every token (X-LoRA: Buehler and Buehler, 2024, arXiv:2402.07148).

    y' = y + sum_i a_i (m_i(y) - y)        a = softmax(x R^T / temperature)        R: [n, d]

With `top=k` only the k largest shares count, rescaled to sum to 1 (Shazeer et al., 2017). R starts N(0, 0.02^2). Parameters:
n d a site, and those of the methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Leaf, Normal
from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._combined import Combined
from deltatune.methods._mixed import no_heads, some


@dataclass(frozen=True)
class Mixture(Combined):
    """Routed experts: y' = y + sum_i softmax(x R^T / temperature)_i (m_i(y) - y) (Buehler and Buehler, 2024)."""

    methods: tuple[Method, ...]
    top: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        some(self)
        no_heads(self, "the router looks at outputs and hidden states")
        if not 0 <= self.top <= len(self.methods):
            raise DeltaTuneError(f"Mixture(top={self.top}) of {len(self.methods)} methods; write 0 for all of them.")

    @property
    def children(self) -> tuple[Method, ...]:
        return self.methods

    @property
    def breaks(self) -> Any:  # type: ignore[override]
        """The laws of the children, and merging: the shares depend on the input."""
        return {**super().breaks, "merge": "which method counts depends on the input, which no weight can express"}

    def own(self, site: Site) -> dict[str, Leaf]:
        width = site.width if self.acts == "stream" else site.d_in
        return {"R": Leaf((len(self.methods), width), Normal(0.02))}

    def mix(self, p: Any, x: Tensor, before: Tensor, after: list[Tensor]) -> Tensor:
        scores = F.linear(x, p.R) / self.temperature
        least = scores.topk(self.top or scores.shape[-1], -1).values[..., -1:]
        shares = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
        changes = torch.stack(after, -1) - before[..., None]
        return before + torch.einsum("...dn,...n->...d", changes, shares)
