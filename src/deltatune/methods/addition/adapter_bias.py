"""AdapterBias: a shared vector, as much of it as the token asks for (Fu et al., 2022, arXiv:2205.00305).

    y' = y + (a . x + c) v        a: [d_in]   c: [1]   v: [d_out]
    W' = W + v a^T,   b' = b + c v

x is the FFN's inner activation, y its output. v starts at zero, so the delta starts neutral; a and c start as a linear
layer's. Parameters: d_in + d_out + 1 a site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Leaf, Uniform
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site


@dataclass(frozen=True)
class AdapterBias(OnLinear):
    """Token-dependent bias: y' = y + (a . x + c) v (Fu et al., 2022)."""

    where = "ffn.down"

    def leaves(self, site: Site) -> dict[str, Leaf]:
        start = Uniform(1 / math.sqrt(site.d_in))
        return {"a": Leaf((site.d_in,), start), "c": Leaf((1,), start), "v": Leaf((site.d_out,))}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return W + (p.v[:, None] * p.a).to(W.dtype)

    def bias(self, p: Any, b: Tensor | None) -> Tensor:
        shift = p.c * p.v
        return shift if b is None else b + shift.to(b.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + (x.to(y.dtype) @ p.a[:, None] + p.c) * p.v
