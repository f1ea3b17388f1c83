"""LLaMA-Adapter: gated attention to trained states, layer by layer (Zhang et al., 2023, arXiv:2303.16199).

    o' = o + g softmax(q K^T / sqrt(d_h)) V        K, V = P W_k^T, P W_v^T        P: [length, d]   g: [1]

in front of the output projection, with a softmax of its own and the layer's own projections to keys and values, without
positions. P starts N(0, 1) and the gate g at zero, so the delta starts neutral. Parameters: length d + 1 a site. The paper
has the last 30 of 32 layers: `.at("attn[2:]")`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Init, Leaf, Normal
from deltatune.core.method import OnQueries
from deltatune.core.site import Site
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class LLaMAAdapter(OnQueries):
    """Zero-initialised gated attention: o' = o + g softmax(q K_P^T) V_P (Zhang et al., 2023)."""

    length: int = 10
    init: Init = Normal(1.0)

    where = "attn"

    def __post_init__(self) -> None:
        check_least(self, length=self.length)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"P": Leaf((self.length, site.d_in), self.init), "g": Leaf((1,))}

    def attend(self, p: Any, q: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        K, V = project(p.P)
        return p.g * ((q @ K.mT).softmax(-1) @ V)
