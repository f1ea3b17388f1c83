"""Fixed mask: a few chosen entries of every parameter are trained, the second phase of diff pruning (Guo et al., 2021, arXiv:2012.07463).

    theta' = theta + value at index        value, index: [k]

`prune` of diff pruning says which entries, and how many there are at each address (`counts`); without it they are `share`
of every tensor's, drawn at random. value starts at zero, so the delta starts neutral; index is stored. Parameters:
share |theta|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import OnTensor
from deltatune.core.site import Site
from deltatune.methods._sparse import Counts, RandomEntries, add_at, check_share, size


@dataclass(frozen=True)
class FixedMask(OnTensor):
    """Fixed mask: theta' = theta + value at index (Guo et al., 2021)."""

    share: float = 0.005
    counts: Counts = ()

    where = "block"

    def __post_init__(self) -> None:
        check_share("FixedMask", self.share)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        k = (size(site, self.share, self.counts),)
        return {"value": Leaf(k), "index": Leaf(k, RandomEntries(), trained=False, stored=True)}

    def value(self, p: Any, theta: Tensor) -> Tensor:
        return add_at(theta, p.index, p.value)
