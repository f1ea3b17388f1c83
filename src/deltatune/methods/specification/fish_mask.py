"""FISH mask: the entries with the largest Fisher information are trained (Sung et al., 2021, arXiv:2111.09839).

    theta' = theta + value at index        value, index: [k]
    index = the k largest of F_i = mean over examples of (d log p(y | x) / d theta_i)^2

value starts at zero, so the delta starts neutral; index comes from the evidence `fisher` and is stored. Parameters:
share |theta|. `FISH` takes the share of every parameter tensor by itself; `fish_mask` counts over all of them together,
as the paper does, and says in `counts` how many entries that leaves to each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.delta import Delta, Term, place
from deltatune.core.leaf import Leaf
from deltatune.core.method import OnTensor
from deltatune.core.site import Site
from deltatune.methods._sparse import (
    Counts,
    LargestFisher,
    add_at,
    by_module,
    check_share,
    size,
    sparse_leaves,
    top_of_all,
)


@dataclass(frozen=True)
class FISH(OnTensor):
    """Fisher-induced sparse mask: theta' = theta + value at the entries of the largest Fisher information (Sung et al., 2021)."""

    share: float = 0.005
    counts: Counts = ()

    where = "block"

    def __post_init__(self) -> None:
        check_share("FISH", self.share)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return sparse_leaves(size(site, self.share, self.counts), LargestFisher())

    def value(self, p: Any, theta: Tensor) -> Tensor:
        return add_at(theta, p.index, p.value)


def fish_mask(model: nn.Module, fisher: Mapping[str, Tensor], share: float = 0.005, where: str = FISH.where) -> Delta:
    """Return the delta of the top `share` over all parameters together: one term a module (Sung et al., 2021).

    `fisher` is what `evidence(model, FISH(), rows)["fisher"]` measures; `init` needs the same evidence afterwards.
    """
    check_share("fish_mask", share)
    sites = [placement.site for placement in place(model, FISH().at(where))]
    scores = [fisher[f"{site.path}.{site.tensor}"].to("cpu", torch.float32) for site in sites]
    found = by_module(sites, top_of_all(scores, share))
    return Delta(tuple(Term(where, FISH(share, counts)) for where, counts in found.items()))
