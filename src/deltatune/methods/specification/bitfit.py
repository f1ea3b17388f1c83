"""BitFit: only biases are trained (Ben Zaken et al., 2022, arXiv:2106.10199).

    f'(x) = f(x) + b        b: [d_out]

at every linear and every norm, whether the backbone has a bias there or not (T5 and Llama have none). b starts at zero,
so the delta starts neutral. Parameters: d_out a site, 7 d + d_ff a layer of BERT (Ding et al., 2022, table
1). `bitfit_subset()` has d + d_ff of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.delta import Delta
from deltatune.core.fused import added
from deltatune.core.leaf import Leaf
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site


@dataclass(frozen=True)
class BitFit(OnLinear):
    """Bias tuning: f'(x) = f(x) + b (Ben Zaken et al., 2022)."""

    where = "{attn.{q,k,v,o},cross.{q,k,v,o}?,ffn.{gate?,up,down},norm?}"
    kinds = ("linear", "norm")
    batched = True

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"b": Leaf((site.d_out,))}

    def bias(self, p: Any, b: Tensor | None) -> Tensor:
        return p.b if b is None else b + p.b.to(b.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return added(y, p.b)


def bitfit_subset() -> Delta:
    """Half of BitFit, nearly as good: the biases of the queries and of the FFN's first layer (Ben Zaken et al., 2022, section 4)."""
    return BitFit().at("{attn.q,ffn.up}")
