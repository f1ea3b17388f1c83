"""SHiRA: a few entries of a weight are trained, at high rank (Bhardwaj et al., 2024, arXiv:2406.13175).

    W' = W + value at index        value, index: [rank (d_in + d_out)]

as many entries as a LoRA of this rank has parameters. index is drawn at random from the seed, or chosen by `entries`:
`LargestWeights()`, `LargestGradients()`, `LargestSaliency()` (the paper's WM, Grad and SNIP), and is stored then. value
starts at zero, so the delta starts neutral. Parameters: rank (d_in + d_out) a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_least
from deltatune.methods._sparse import Entries, RandomEntries, add_at, sparse_leaves, sparse_linear


@dataclass(frozen=True)
class SHiRA(OnLinear):
    """Sparse high-rank adapter: W' = W + value at index (Bhardwaj et al., 2024)."""

    rank: int = 32
    entries: Entries = RandomEntries()

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        k, whole = self.rank * (site.d_in + site.d_out), site.d_in * site.d_out
        if k > whole:
            most = whole // (site.d_in + site.d_out)
            raise DeltaTuneError(
                f"SHiRA(rank={self.rank}) needs {k} entries of {site.path!r}, which has {site.d_out} x {site.d_in} = {whole}; "
                f"write a rank of at most {most}."
            )
        return sparse_leaves(k, self.entries)

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return add_at(W, p.index, p.value)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return y + sparse_linear(x, p.index, p.value, y.shape[-1])
