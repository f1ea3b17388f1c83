"""Lily: low-rank changes whose second factors are shared and mixed by a router (Zhong et al., 2025, arXiv:2407.09946).

    f'(x) = f(x) + scale sum_e softmax(C h)_e B_e^T h        h = A x        A: [rank, d_in]   C: [experts, rank]

A and C belong to a site and start uniform (Kaiming); B: [experts, rank, d_out] is one tensor for all sites of the term
and starts at zero, so the delta starts neutral. As sites share B they need one width: write one term for each role. The
published code averages the softmax over a whole batch, which would make one row's output depend on the others; here
every position has its own. Parameters: rank (d_in + experts) a site and experts rank d_out for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.core.leaf import KaimingUniform, Leaf, Zeros
from deltatune.core.method import Law, OnBranch
from deltatune.core.site import Site
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class Lily(OnBranch):
    """Low-rank interconnected adaptation: f'(x) = f(x) + scale sum_e softmax(C h)_e B_e^T h (Zhong et al., 2025)."""

    rank: int = 32
    experts: int = 2
    scale: float = 1.0

    where = "{attn.v,cross.v?}"
    kinds = ("linear",)
    breaks: ClassVar[dict[Law, str]] = {"merge": "its router makes the change of the weight depend on the input"}

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)
        check_least(self, 2, experts=self.experts)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        return {
            "A": Leaf((self.rank, site.d_in), KaimingUniform()),
            "B": Leaf((self.experts, self.rank, site.d_out), Zeros(), scope="delta"),
            "C": Leaf((self.experts, self.rank), KaimingUniform()),
        }

    def output(self, p: Any, x: Tensor, y: Tensor) -> Tensor:
        h = x.to(y.dtype) @ p.A.mT
        weighted = torch.softmax(h @ p.C.mT, -1).unsqueeze(-1) * h.unsqueeze(-2)  # [..., experts, rank]
        return y + (weighted.flatten(-2) @ p.B.flatten(0, 1)) * self.scale
