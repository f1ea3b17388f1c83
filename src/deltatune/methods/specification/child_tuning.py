"""Child-tuning: each step trains a part of the parameters (Xu et al., 2021, arXiv:2109.05687).

    ChildTuning: theta' = value, d loss / d value = g * mask        mask ~ Bernoulli(keep) / keep, anew at every step
    ChildTuningD: theta' = theta + value at index                   the share of theta with the largest Fisher information

`ChildTuning` is task-free: value starts as a copy of theta. `ChildTuningD` is task-driven: value starts at zero and index
comes from the evidence `fisher`. Both start neutral. Parameters: |theta|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Copy, Leaf, Ones
from deltatune.core.method import OnTensor
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sparse import LargestFisher, add_at, check_share, size, sparse_leaves


@dataclass(frozen=True)
class ChildTuning(OnTensor):
    """Task-free child-tuning: fine-tuning with a random gradient mask Bernoulli(keep) / keep (Xu et al., 2021)."""

    keep: float = 0.3

    where = "block"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise DeltaTuneError(
                f"ChildTuning(keep={self.keep}) is no probability to keep a gradient; write one above 0 and up to 1."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"value": Leaf(site.shape, Copy()), "mask": Leaf(site.shape, Ones(), trained=False)}

    def value(self, p: Any, theta: Tensor) -> Tensor:
        fixed = p.value.detach()
        return fixed + (p.value - fixed) * p.mask  # the value itself; only its gradient sees the mask

    def draw(self, p: Any, generator: Generator) -> dict[str, Tensor]:
        kept = torch.rand(p.mask.shape, generator=generator, device=generator.device) < self.keep
        return {"mask": kept.to(p.mask) / self.keep}


@dataclass(frozen=True)
class ChildTuningD(OnTensor):
    """Task-driven child-tuning: the share of every parameter with the largest Fisher information (Xu et al., 2021).

    Parameters: share |theta|.
    """

    share: float = 0.3

    where = "block"

    def __post_init__(self) -> None:
        check_share("ChildTuningD", self.share)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return sparse_leaves(size(site, self.share, ()), LargestFisher())

    def value(self, p: Any, theta: Tensor) -> Tensor:
        return add_at(theta, p.index, p.value)
