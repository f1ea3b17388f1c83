"""Masking: the weights stay, a binary mask chooses among them (Zhao et al., 2020, arXiv:2004.12406).

    W' = M * W        M = 1[m > threshold]   m, M: [d_out, d_in]

The gradient of M is handed to m as it is (straight through). m starts uniform in (-scale, b), with b such that the share
`sparsity` of M starts at 0. Parameters: d_in d_out a site, of which one bit each is needed after training. The paper
masks the blocks from the third on: `Masking().at("{attn.{q,k,v,o},ffn.{up,down}}[2:]")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape
from deltatune.core.method import OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class Above(Init):
    """U(-scale, b) with b such that the share `sparsity` lies at or below `threshold` (Zhao et al., 2020)."""

    threshold: float
    sparsity: float
    scale: float

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        width = (self.scale + self.threshold) / self.sparsity
        return torch.rand(shape, generator=generator) * width - self.scale


@dataclass(frozen=True)
class Masking(OnLinear):
    """Binary mask: W' = 1[m > threshold] * W, trained straight through (Zhao et al., 2020)."""

    sparsity: float = 0.05
    threshold: float = 0.01
    scale: float = 0.02

    where = "{attn.{q,k,v,o},cross.{q,k,v,o}?,ffn.{gate?,up,down}}"
    breaks = {"identity": "a share of the weights starts masked, which is where the mask learns from"}  # noqa: RUF012

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise DeltaTuneError(
                f"Masking(sparsity={self.sparsity}) is no share of masked weights; write one between 0 and 1, e.g. 0.05."
            )
        if self.scale <= -self.threshold:
            raise DeltaTuneError(
                f"Masking(scale={self.scale}, threshold={self.threshold}) starts with nothing below the threshold; "
                f"write a scale above {-self.threshold}."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"m": Leaf((site.d_out, site.d_in), Above(self.threshold, self.sparsity, self.scale))}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        M = (p.m > self.threshold).to(p.m.dtype)
        return W * (M + (p.m - p.m.detach())).to(W.dtype)
