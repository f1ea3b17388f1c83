"""Uni-LoRA: all of LoRA's factors as copies of the entries of one vector (Li et al., 2025, arXiv:2506.00799).

    W' = W + B A        [A, B]_i = theta_j(i) / sqrt(n_j)        theta: [size], shared by all sites

Entry i of a site's factors copies entry j(i) of theta; each j serves as many entries as any other, n_j, up to one. So
the map from theta to the factors of a site keeps lengths, as the paper's does to those of all sites together (there n_j
counts over all of them). The j(i) are not trained and come back from the seed. theta starts U(-0.02, 0.02), so the delta
starts near neutral but not exactly. The default size is the paper's for RoBERTa. Parameters: size in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape, Uniform
from deltatune.core.method import Base, Law, OnLinear
from deltatune.core.site import Site
from deltatune.methods._low_rank import changed, routed
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class Balanced(Init):
    """Whole numbers below `below` in random order, each as often as any other up to one, int64."""

    below: int

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        count = shape[0]
        rest = torch.randperm(self.below, generator=generator)[: count % self.below]
        all_ = torch.cat([torch.arange(self.below).repeat(count // self.below), rest])
        return all_[torch.randperm(count, generator=generator)]


@dataclass(frozen=True)
class UniLoRA(OnLinear):
    """One vector for all of LoRA: W' = W + B A, [A, B]_i = theta_j(i) / sqrt(n_j) (Li et al., 2025)."""

    rank: int = 4
    size: int = 23040
    init: Init = Uniform(0.02)

    where = "{attn.{q,v},cross.{q,v}?}"
    breaks: ClassVar[dict[Law, str]] = {"identity": "both factors start from one vector, which is not zero"}

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank, size=self.size)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        entries = self.rank * (site.d_in + site.d_out)
        index = Leaf((entries,), Balanced(self.size), trained=False)
        return {"j": index, "theta": Leaf((self.size,), self.init, scope="delta")}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return changed(W, *self._factors(p, W.shape[1]))

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return routed(x, y, *self._factors(p, x.shape[-1]))

    def _factors(self, p: Any, d_in: int) -> tuple[Tensor, Tensor]:
        n = torch.zeros(self.size, dtype=torch.float32, device=p.j.device)
        n = n.scatter_add(0, p.j, torch.ones_like(p.j, dtype=torch.float32))
        entries = (p.theta * n.clamp(min=1).rsqrt().to(p.theta.dtype))[p.j].view(self.rank, -1)
        return entries[:, :d_in], entries[:, d_in:].mT
