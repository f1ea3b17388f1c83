"""Parallel adapter: a bottleneck beside a sub-layer, on what goes into it (He et al., 2022, arXiv:2110.04366).

    y' = y + scale (f(x D^T + d) U^T + u)        D: [size, d_in]   d: [size]   U: [d_out, size]   u: [d_out]

x is the sub-layer's input and y its output. D starts uniform (Kaiming), U and the biases at zero, so the delta starts
neutral. `scale` is a number, or an initialiser (`scale=Ones()`): then it is trained, one number a site. Parameters:
size (d_in + d_out + 1) + d_out a site, and 1 for a trained scale. `mam()` puts a prefix beside it, as the paper does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.delta import Delta, parse
from deltatune.core.leaf import Init, KaimingUniform, Leaf
from deltatune.core.method import OnBranch
from deltatune.core.site import Site
from deltatune.methods._activations import ACTIVATIONS, check_activation
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class ParallelAdapter(OnBranch):
    """Parallel adapter: y' = y + scale (f(x D^T + d) U^T + u) (He et al., 2022)."""

    size: int = 512
    scale: float | Init = 4.0
    activation: str = "relu"
    init: Init = KaimingUniform()

    where = "ffn"

    def __post_init__(self) -> None:
        check_least(self, size=self.size)
        check_activation(self.activation)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        m = self.size
        trained = {"scale": Leaf((1,), self.scale)} if isinstance(self.scale, Init) else {}
        bottleneck = {"D": Leaf((m, site.d_in), self.init), "d": Leaf((m,)), "U": Leaf((site.d_out, m))}
        return {**bottleneck, "u": Leaf((site.d_out,)), **trained}

    def output(self, p: Any, x: Tensor, y: Tensor) -> Tensor:
        scale = vars(p).get("scale", self.scale)
        return y + scale * F.linear(ACTIVATIONS[self.activation](F.linear(x.to(y.dtype), p.D, p.d)), p.U, p.u)


def mam(length: int = 30, size: int = 512, scale: float = 4.0) -> Delta:
    """Mix-and-match: a prefix in every attention and a scaled parallel adapter at every FFN (He et al., 2022, section 4.6)."""
    return parse(f"PrefixTuning(length={length}) + ParallelAdapter(size={size}, scale={scale})")
