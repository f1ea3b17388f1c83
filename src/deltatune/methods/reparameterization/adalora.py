"""AdaLoRA: a change in the form of a singular value decomposition, whose rank goes where it matters (Zhang et al., 2023, arXiv:2303.10512).

    W' = W + (alpha / n) P diag(lam) Q        P: [d_out, n]   lam: [n]   Q: [n, d_in]   n = rank + extra
    loss + orthogonality (|P^T P - I|^2 + |Q Q^T - I|^2)     at every site, Frobenius norms

After every step the importance of w is s(w) = I(w) U(w), with I the running mean of |w dloss/dw| and U that of
|(w dloss/dw) - I|; triplet i scores s(lam_i) + mean s(P_i) + mean s(Q_i). Every `interval` steps the triplets outside
the budget, over all sites, get lam_i = 0. After `warmup` steps the budget falls from n to `rank` a site,

    b(t) = rank + extra (1 - (t - warmup) / (steps - warmup - cooldown))^3

and during the last `cooldown` steps what is zero stays zero. P and Q start N(0, 0.02^2), lam at zero, so the delta starts
neutral. Parameters: n (d_in + d_out + 1) a site. The running means travel with the weights, to train on.

P and Q become orthonormal, with entries of 1 / sqrt(d), and leave the size of the change to lam alone, which has to come
from 0 to the order of 1. So it learns `lam_rate` times as fast as the recipe says; the default is ours, chosen on dev data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core.leaf import Init, Leaf, Normal, Ones, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._importance import importance, observed
from deltatune.methods._low_rank import changed, routed
from deltatune.methods._sizes import check_least

TRAINED = ("P", "lam", "Q")


@dataclass(frozen=True)
class AdaLoRA(OnLinear):
    """Adaptive low-rank adaptation: W' = W + (alpha / n) P diag(lam) Q under a budget of ranks (Zhang et al., 2023)."""

    rank: int = 8
    alpha: float = 16.0
    extra: int = 4
    warmup: int = 0
    cooldown: int = 0
    interval: int = 1
    decay: float = 0.85
    orthogonality: float = 0.1
    lam_rate: float = 30.0
    init: Init = Normal(0.02)

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank, interval=self.interval)
        check_least(self, 0, extra=self.extra, warmup=self.warmup, cooldown=self.cooldown)

    @property
    def width(self) -> int:
        """The rank that every site has at first."""
        return self.rank + self.extra

    def leaves(self, site: Site) -> dict[str, Leaf]:
        if self.width > min(site.d_in, site.d_out):
            raise DeltaTuneError(
                f"AdaLoRA(rank={self.rank}, extra={self.extra}) starts at rank {self.width}, above the dimensions of "
                f"{site.path!r}: {site.d_out} x {site.d_in}; write less in all."
            )
        shapes = {"P": (site.d_out, self.width), "lam": (self.width,), "Q": (self.width, site.d_in)}
        trained = {n: Leaf(shapes[n], self.init) for n in ("P", "Q")}
        trained["lam"] = Leaf(shapes["lam"], Zeros(), rate=self.lam_rate)
        means = {f"means_{n}": Leaf((2, *shape), trained=False, stored=True) for n, shape in shapes.items()}
        return {**trained, **means, "kept": Leaf((self.width,), Ones(), trained=False, stored=True)}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return changed(W, p.lam[:, None] * p.Q, p.P, self.alpha / self.width)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return routed(x, y, p.lam[:, None] * p.Q, p.P, self.alpha / self.width)

    def penalty(self, p: Any) -> Tensor | None:
        eye = torch.eye(self.width, dtype=p.P.dtype, device=p.P.device)
        off = (p.P.mT @ p.P - eye).square().sum() + (p.Q @ p.Q.mT - eye).square().sum()
        return self.orthogonality * off

    def budget(self, step: int, steps: int) -> float:
        """Return the mean rank that a site may have after `step` of `steps` steps."""
        last = steps - self.cooldown
        if self.warmup >= last:
            raise DeltaTuneError(
                f"AdaLoRA(warmup={self.warmup}, cooldown={self.cooldown}) leaves none of {steps} steps to choose ranks in; "
                f"write less than {steps} in all."
            )
        left = 1 - (min(max(step, self.warmup), last) - self.warmup) / (last - self.warmup)
        return self.rank + self.extra * left**3

    def step(self, sites: list[Any], step: int, steps: int) -> list[dict[str, Tensor]] | None:
        allowed, last = self.budget(step, steps), steps - self.cooldown
        if step > last:
            return [{"lam": p.lam * p.kept} for p in sites]
        decay = self.decay if step < last else 1.0  # the last choice rests on what was seen before it
        means = [{n: observed(vars(p)[n], vars(p)[f"means_{n}"], decay) for n in TRAINED} for p in sites]
        changes = [{f"means_{n}": mean for n, mean in seen.items()} for seen in means]
        if step <= self.warmup or (step % self.interval and step < last):
            return changes
        scores = torch.stack([_score(seen) for seen in means])
        cut = self.width * len(sites) - int(allowed * len(sites))
        below = scores.flatten().kthvalue(cut).values if cut else scores.new_tensor(-torch.inf)
        kept = (scores > below).float()
        return [{**c, "lam": p.lam * k, "kept": k} for c, p, k in zip(changes, sites, kept, strict=True)]


def _score(means: dict[str, Tensor]) -> Tensor:
    """Return the importance of each triplet, [rank]."""
    s = {name: importance(mean) for name, mean in means.items()}
    return s["lam"] + s["P"].mean(0) + s["Q"].mean(1)
