"""Choose: a method with a weight that says how much of it is there (S3Delta: Hu et al., 2022, arXiv:2206.07382).

    y' = y + z (m(y) - y)        z: [1]

z starts at one. While a structure is searched z is a sample of a relaxed coin; `tuning.structure` is the search. Parameters:
1 a site, and those of m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Leaf, Ones
from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.methods._combined import Combined
from deltatune.methods._mixed import no_heads


@dataclass(frozen=True)
class Choose(Combined):
    """Weighed method: y' = y + z (inner(y) - y) with a trained z (Hu et al., 2022)."""

    inner: Method

    def __post_init__(self) -> None:
        no_heads(self, "what stands beside the text has no weight")

    @property
    def children(self) -> tuple[Method, ...]:
        return (self.inner,)

    def own(self, site: Site) -> dict[str, Leaf]:
        return {"z": Leaf((1,), Ones())}

    def mix(self, p: Any, x: Tensor, before: Tensor, after: list[Tensor]) -> Tensor:
        return before + p.z * (after[0] - before)
