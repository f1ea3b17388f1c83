"""Intrinsic dimension: all parameters moved by one short vector (Aghajanyan et al., 2021, arXiv:2012.13255; Li et al.,
2018, arXiv:1804.08838).

    DID: theta_i' = theta_i + (P z)_i                  z: [dim], one for the whole delta
    SAID: theta_i' = theta_i + lambda_i (P z)_i        lambda_i: [1], one for each parameter tensor

P is a Fastfood projection, drawn from the seed for each parameter tensor and never stored. z starts at zero and lambda at
one, so the delta starts neutral. Parameters: dim in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Leaf, Ones
from deltatune.core.method import OnTensor
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._hadamard import fastfood, fastfood_leaves


@dataclass(frozen=True)
class DID(OnTensor):
    """Direct intrinsic dimension: theta' = theta + P z (Aghajanyan et al., 2021)."""

    dim: int = 1000

    where = "path:**"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise DeltaTuneError(f"{type(self).__name__}(dim={self.dim}) has no dimension; write at least 1.")

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"z": Leaf((self.dim,), scope="delta"), **fastfood_leaves(prod(site.shape), self.dim)}

    def value(self, p: Any, theta: Tensor) -> Tensor:
        return theta + fastfood(p.z, p.signs, p.order, p.gains, theta.numel()).view(theta.shape)


@dataclass(frozen=True)
class SAID(DID):
    """Structure-aware intrinsic dimension: theta' = theta + lambda P z (Aghajanyan et al., 2021).

    Parameters: dim + the number of parameter tensors in all.
    """

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {**super().leaves(site), "scale": Leaf((1,), Ones())}

    def value(self, p: Any, theta: Tensor) -> Tensor:
        return theta + p.scale * fastfood(p.z, p.signs, p.order, p.gains, theta.numel()).view(theta.shape)
