"""SSF: the features behind a linear layer are scaled and shifted (Lian et al., 2022, arXiv:2210.08823).

    y' = g * y + s        W' = g W,   b' = g * b + s        g, s: [d_out]

g starts at one and s at zero, so that the delta starts exactly neutral; the paper starts them N(1, 0.02^2) and
N(0, 0.02^2). It is put behind norms too, where scale and shift are what `LNTuning()` trains. Parameters: 2 d_out a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Init, Leaf, Ones, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site


@dataclass(frozen=True)
class SSF(OnLinear):
    """Scale and shift: y' = g * y + s (Lian et al., 2022)."""

    scale: Init = Ones()
    shift: Init = Zeros()

    where = "{attn.{q,k,v,o},cross.{q,k,v,o}?,ffn.{gate?,up,down}}"

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"g": Leaf((site.d_out,), self.scale), "s": Leaf((site.d_out,), self.shift)}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return p.g.to(W.dtype)[:, None] * W

    def bias(self, p: Any, b: Tensor | None) -> Tensor:
        return p.s if b is None else p.g.to(b.dtype) * b + p.s.to(b.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return p.g * y + p.s
