"""LN-tuning: the weights and biases of the norms are trained (Qi et al., 2022, arXiv:2211.08682).

    norm'(x) = g' x^ + b'        g', b': [d], x^ the normalised x

g' and b' start as the backbone's own, so the delta starts neutral. Parameters: 2 d a LayerNorm, d an RMSNorm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Copy, Leaf
from deltatune.core.method import OnTensor
from deltatune.core.site import Site


@dataclass(frozen=True)
class LNTuning(OnTensor):
    """Norm tuning: norm'(x) = g' x^ + b' (Qi et al., 2022)."""

    where = "norm"

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"value": Leaf(site.shape, Copy())}

    def value(self, p: Any, theta: Tensor) -> Tensor:
        return p.value
