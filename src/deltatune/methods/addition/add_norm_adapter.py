"""Add-norm adapter: a bottleneck that reads the normed sum behind a sub-layer (Pfeiffer et al., 2021, arXiv:2005.00247).

    y' = y + f(z D^T + d) U^T + u        z = g * (x + y - m) / sqrt(v + eps) + b        D: [size, d]   U: [d, size]

x is the sub-layer's input and y its output, m and v are the mean and the variance of x + y over its features: z is what a
backbone with norms behind its sub-layers would hand on, and that norm follows y' as before. d: [size] and u: [d] are biases;
g and b: [d] are stored and not trained, one and zero unless a file brings the backbone's own. D starts N(0, 0.01^2), U and the
biases at zero, so the delta starts neutral. It is the adapter of AdapterFusion and AdapterHub on BERT and its like.
Parameters: 2 d size + size + d a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Init, Leaf, Normal, Ones, Zeros
from deltatune.core.method import OnBranch
from deltatune.core.site import Site
from deltatune.methods._activations import ACTIVATIONS, check_activation
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class AddNormAdapter(OnBranch):
    """Adapter on the normed sum: y' = y + f(norm(x + y) D^T + d) U^T + u (Pfeiffer et al., 2021)."""

    size: int = 48
    activation: str = "relu"
    eps: float = 1e-12
    down: Init = Normal(0.01)
    up: Init = Zeros()

    where = "ffn"
    kinds = ("norm", "container")  # what adds up has one width

    def __post_init__(self) -> None:
        check_least(self, size=self.size)
        check_activation(self.activation)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        d, m = site.d_out, self.size
        norm = {"g": Leaf((d,), Ones(), trained=False, stored=True), "b": Leaf((d,), trained=False, stored=True)}
        return {"D": Leaf((m, d), self.down), "d": Leaf((m,)), "U": Leaf((d, m), self.up), "u": Leaf((d,)), **norm}

    def output(self, p: Any, x: Tensor, y: Tensor) -> Tensor:
        z = F.layer_norm(x.to(y.dtype) + y, p.g.shape, p.g, p.b, self.eps)
        return y + F.linear(ACTIVATIONS[self.activation](F.linear(z, p.D, p.d)), p.U, p.u)
