"""Poly: an inventory of low-rank skills, mixed for each task (Ponti et al., 2022, arXiv:2202.13914; splits: Caccia et al., 2022).

    W' = W + B A / rank        A = [sum_s z_qs A_qs]_q   A_qs: [rank, d_in / splits]
                               B = [sum_s z_qs B_qs]_q   B_qs: [d_out / splits, rank]
    z_qs = g_qs / sum_s g_qs,   g = sigmoid(logits[task] + noise)        logits: [tasks, splits skills]

noise = log u - log(1 - u) with u ~ U(0, 1) anew at every training step, and 0 outside training. A starts uniform
(Kaiming), B at zero, so the delta starts neutral; logits start U(-1e-3, 1e-3). `task` says whose mixture acts: the
weights of one task are those of another with `task` changed. Parameters: skills rank (d_in + d_out) + tasks splits skills
a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import KaimingUniform, Leaf, Uniform
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_divides, check_least, check_rank


@dataclass(frozen=True)
class Poly(OnLinear):
    """Mixed low-rank skills: W' = W + B A / rank, A and B mixed by the task's logits (Ponti et al., 2022)."""

    rank: int = 8
    skills: int = 4
    splits: int = 1
    tasks: int = 1
    task: int = 0

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank, skills=self.skills, splits=self.splits, tasks=self.tasks)
        if not 0 <= self.task < self.tasks:
            raise DeltaTuneError(
                f"Poly(tasks={self.tasks}) has no task {self.task}; write one of 0 to {self.tasks - 1}."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        for width in (site.d_in, site.d_out):
            check_divides(self, "splits", self.splits, width, site)
        q, s, r = self.splits, self.skills, self.rank
        factors = {"A": Leaf((q, s, r, site.d_in // q), KaimingUniform()), "B": Leaf((q, s, site.d_out // q, r))}
        logits = Leaf((self.tasks, q * s), Uniform(1e-3))
        return {**factors, "logits": logits, "noise": Leaf((q, s), trained=False)}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        A, B = self._mixed(p)
        return W + (B @ A).to(W.dtype) / self.rank

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        A, B = self._mixed(p)
        return y + x.to(y.dtype) @ A.mT @ B.mT / self.rank

    def draw(self, p: Any, generator: Generator) -> dict[str, Tensor]:
        u = torch.rand(p.noise.shape, generator=generator, device=generator.device).clamp(1e-6, 1 - 1e-6)
        return {"noise": torch.logit(u).to(p.noise)}

    def _mixed(self, p: Any) -> tuple[Tensor, Tensor]:
        g = torch.sigmoid(p.logits[self.task].unflatten(0, p.noise.shape) + p.noise)
        z = g / (g.sum(-1, keepdim=True) + 1e-12)
        A = torch.einsum("qs,qsrd->rqd", z, p.A)
        return A.flatten(1), torch.einsum("qs,qsdr->qdr", z, p.B).flatten(0, 1)
