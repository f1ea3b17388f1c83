"""Super-Tuning: the entries of the largest magnitude are trained (arXiv:2607.09287, 2026).

    W' = W + value at index        value, index: [k],   k = floor(share d_in d_out)
    index = the k largest |W|      (`entries=SmallestWeights()`: the paper's bottom variant)

value starts at zero, so the delta starts neutral; index is stored. Parameters: floor(share d_in d_out) a site. The
paper's Supra adds a low-rank change: `SuperTuning() + LoRA()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sparse import Entries, LargestWeights, add_at, check_share, numel, sparse_leaves, sparse_linear


@dataclass(frozen=True)
class SuperTuning(OnLinear):
    """Super-Tuning: W' = W + value at the entries of the largest magnitude (arXiv:2607.09287)."""

    share: float = 0.01
    entries: Entries = LargestWeights()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_share("SuperTuning", self.share)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        k = int(self.share * numel(site))
        if k < 1:
            raise DeltaTuneError(
                f"SuperTuning(share={self.share}) leaves no entry of {site.path!r}, which has {numel(site)}; "
                f"write a share of at least {1 / numel(site):.2g}."
            )
        return sparse_leaves(k, self.entries)

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return add_at(W, p.index, p.value)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + sparse_linear(x, p.index, p.value, y.shape[-1])
