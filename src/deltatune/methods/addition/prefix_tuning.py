"""Prefix tuning: trained keys and values in front of those of the text, in every attention (Li and Liang, 2021, arXiv:2101.00190).

    head = softmax(q [K_P; K]^T / sqrt(d_h)) [V_P; V]        K_P, V_P: [length, heads d_h]

K and V start N(0, 0.02^2). Parameters: 2 length d_kv a site. `Reparam(PrefixTuning(), through=MLP())` trains them through
a network, as the paper does; `weights.flatten()` then leaves the network behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Init, Leaf, Normal
from deltatune.core.method import OnHeads
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class PrefixTuning(OnHeads):
    """Prefix: keys [K_P; K] and values [V_P; V] in every attention (Li and Liang, 2021)."""

    length: int = 30
    init: Init = Normal(0.02)

    where = "{attn,cross?}"
    breaks = {**OnHeads.breaks, "identity": "keys in front of the text take attention from the first step on"}  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DeltaTuneError(f"PrefixTuning(length={self.length}) has no keys; write a length of at least 1.")

    def leaves(self, site: Site) -> dict[str, Leaf]:
        assert site.heads is not None  # placing checks it
        width = site.heads.key * site.heads.width
        return {"K": Leaf((self.length, width), self.init), "V": Leaf((self.length, width), self.init)}

    def prefix(self, p: Any, heads: int) -> tuple[Tensor, Tensor]:
        K, V = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (p.K, p.V))
        return K, V
