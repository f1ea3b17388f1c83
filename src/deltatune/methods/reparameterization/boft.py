"""BOFT: OFT with butterfly factors, blocks that reach across the whole width (Liu et al., 2024, arXiv:2311.06243).

    W' = diag(s) W (B_factors ... B_1)^T        B_i = P_i diag(R_i1, R_i2, ...) P_i^T        R_ij: [block, block]

R_ij, orthogonal, is Cayley's map of a skew matrix, and P_i pairs half blocks that lie 2^(i-1) half blocks apart, so
that every output of the product sees block 2^(factors-1) inputs. One factor is OFT with a trained scale s. A leaf holds
upper triangles of skew matrices, row by row. They start at zero and s: [d_out] at one, so the delta starts neutral.
Parameters: factors d_in (block - 1) / 2 + d_out a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Leaf, Ones
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._rotate import cayley, rotate, skew, triangle
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class BOFT(OnLinear):
    """Butterfly orthogonal finetuning: W' = diag(s) W (B_factors ... B_1)^T (Liu et al., 2024)."""

    block: int = 4
    factors: int = 2

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, 2, block=self.block)
        check_least(self, factors=self.factors)
        if self.block % 2:
            raise DeltaTuneError(
                f"BOFT(block={self.block}) cannot be halved, which its permutations do; write an even block."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        span = self.block * 2 ** (self.factors - 1)
        if site.d_in % span:
            raise DeltaTuneError(
                f"{self} spans blocks of {span}, which do not divide the width {site.d_in} of {site.path!r}; "
                "write a smaller block or fewer factors."
            )
        entries = (self.factors, site.d_in // self.block, triangle(self.block))
        return {"Q": Leaf(entries), "s": Leaf((site.d_out,), Ones())}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        R = cayley(skew(p.Q, self.block)).mT.to(W.dtype)
        for level in range(self.factors):
            W = self._factor(W, R[level], 2**level)
        return p.s[:, None].to(W.dtype) * W

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        R, x = cayley(skew(p.Q, self.block)), x.to(y.dtype)
        for level in reversed(range(self.factors)):
            x = self._factor(x, R[level], 2**level)
        z = F.linear(x, base.weight) * p.s
        return z if base.bias is None else z + base.bias

    def _factor(self, x: Tensor, R: Tensor, apart: int) -> Tensor:
        """Rotate pairs of half blocks that lie `apart` half blocks from each other."""
        half = self.block // 2
        paired = x.unflatten(-1, (-1, 2, apart, half)).transpose(-3, -2).flatten(-4)
        return rotate(paired, R).unflatten(-1, (-1, apart, 2, half)).transpose(-3, -2).flatten(-4)
