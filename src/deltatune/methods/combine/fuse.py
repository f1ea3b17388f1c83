"""AdapterFusion: attention over what several trained methods make of one hidden state (Pfeiffer et al., 2021, arXiv:2005.00247).

    y' = sum_i a_i V z_i              z_i = m_i(y)   a = softmax_i(x Q^T K z_i)
                                      Q, K: [d, d_query] as maps into one space, V: [d_out, d_out]

x is what goes in (for hidden states: the state itself). Q and K start N(0, 0.02^2), V as the identity, so that a fusion of
neutral methods starts neutral. Parameters: size (d_in + d_out) + d_out^2 a site, and those of the methods, which stay as they
are after stage one when their rate is 0 (`frozen=True` makes it so).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Given, Init, Leaf, Normal, Shape
from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.methods._combined import Combined
from deltatune.methods._mixed import no_heads, some


@dataclass(frozen=True)
class Identity(Init):
    """The identity matrix."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.eye(*shape)


@dataclass(frozen=True)
class Fuse(Combined):
    """Fusion: y' = sum_i softmax_i(q(x) . k(z_i)) V z_i over z_i = m_i(y) (Pfeiffer et al., 2021)."""

    methods: tuple[Method, ...]
    size: int = 64
    frozen: bool = False

    def __post_init__(self) -> None:
        some(self)
        no_heads(self, "fusion attends to outputs and hidden states")

    @property
    def children(self) -> tuple[Method, ...]:
        return self.methods

    @property
    def breaks(self) -> Any:  # type: ignore[override]
        """The laws of the children, and merging: the shares depend on the input."""
        return {**super().breaks, "merge": "which method counts depends on the input, which no weight can express"}

    def leaves(self, site: Site) -> dict[str, Leaf]:
        declared = super().leaves(site)
        if self.frozen:
            kept = {n: replace(leaf, trained=False, stored=True) for n, leaf in declared.items() if "/" in n}
            declared = {**declared, **kept}
        return declared

    def own(self, site: Site) -> dict[str, Leaf]:
        width_in = site.d_in if self.acts != "stream" else site.width
        width = site.d_out if self.acts != "stream" else site.width
        return {
            "Q": Leaf((self.size, width_in), Normal(0.02)),
            "K": Leaf((self.size, width), Normal(0.02)),
            "V": Leaf((width, width), Identity()),
        }

    def mix(self, p: Any, x: Tensor, before: Tensor, after: list[Tensor]) -> Tensor:
        z = torch.stack(after, -2)
        shares = torch.einsum("...s,...ns->...n", F.linear(x, p.Q), F.linear(z, p.K)).softmax(-1)
        return F.linear(torch.einsum("...n,...nd->...d", shares, z), p.V)
