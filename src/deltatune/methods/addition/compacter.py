"""Compacter: an adapter whose matrices are sums of Kronecker products (Karimi Mahabadi et al., 2021, arXiv:2106.04647).

    h' = h + f(h D + d) U + u        D = sum_i A_i (x) (Ds_i Dt_i)   Ds: [n, d / n, rank]   Dt: [n, rank, size / n]
                                     U = sum_i A_i (x) (Us_i Ut_i)   Us: [n, size / n, rank]   Ut: [n, rank, d / n]

A: [n, n, n] is shared by all sites; d: [size]; u: [d]; f is gelu (tanh form). A starts N(0, 1e-4^2), the factors Glorot
uniform and the biases at zero, so the delta starts neutral up to about 1e-8. Parameters: n^3 once, and
2 rank (d + size) + size + d a site. `PHMAdapter` has whole matrices D_i: [d / n, size / n] and U_i instead of factors.
The paper trains the norms as well: `compacter() + LNTuning()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.core.delta import Delta
from deltatune.core.leaf import Init, Leaf, Normal, XavierUniform
from deltatune.core.method import OnStream
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_divides, check_least

BOTH = "{attn.o,cross.o?,ffn.down}:out"


@dataclass(frozen=True)
class PHMAdapter(OnStream):
    """Adapter with D = sum_i A_i (x) D_i and U = sum_i A_i (x) U_i (Karimi Mahabadi et al., 2021; Zhang et al., 2021).

    Parameters: n^3 once, and 2 d size / n + size + d a site.
    """

    size: int = 24
    n: int = 4
    rule: Init = Normal(1e-4)

    where = BOTH

    def __post_init__(self) -> None:
        check_least(self, size=self.size, n=self.n)
        if self.size % self.n:
            near = max(self.size // self.n, 1) * self.n
            raise DeltaTuneError(
                f"{type(self).__name__}(size={self.size}, n={self.n}) needs a size that is a multiple of n; "
                f"write size={near} or size={near + self.n}."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_divides(self, "n", self.n, site.width, site)
        n, d, m = self.n, site.width // self.n, self.size // self.n
        own = {"D": Leaf((n, d, m), XavierUniform()), "U": Leaf((n, m, d), XavierUniform())}
        return {**self._around(site), **own}

    def _around(self, site: Site) -> dict[str, Leaf]:
        shared = Leaf((self.n, self.n, self.n), self.rule, scope="delta")
        return {"A": shared, "d": Leaf((self.size,)), "u": Leaf((site.width,))}

    def stream(self, p: Any, h: Tensor) -> Tensor:
        return _adapt(h, _kronecker(p.A, p.D), p.d, _kronecker(p.A, p.U), p.u)


@dataclass(frozen=True)
class Compacter(PHMAdapter):
    """Adapter with D = sum_i A_i (x) (Ds_i Dt_i), and U alike (Karimi Mahabadi et al., 2021)."""

    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_divides(self, "n", self.n, site.width, site)
        n, d, m, r = self.n, site.width // self.n, self.size // self.n, self.rank
        shapes = {"Ds": (n, d, r), "Dt": (n, r, m), "Us": (n, m, r), "Ut": (n, r, d)}
        return {**self._around(site), **{name: Leaf(shape, XavierUniform()) for name, shape in shapes.items()}}

    def stream(self, p: Any, h: Tensor) -> Tensor:
        return _adapt(h, _kronecker(p.A, p.Ds @ p.Dt), p.d, _kronecker(p.A, p.Us @ p.Ut), p.u)


def _kronecker(A: Tensor, B: Tensor) -> Tensor:
    """Return sum_i A_i (x) B_i, [n k, n j], for A [n, n, n] and B [n, k, j]."""
    return torch.einsum("iab,ikj->akbj", A, B).flatten(2, 3).flatten(0, 1)


def _adapt(h: Tensor, D: Tensor, d: Tensor, U: Tensor, u: Tensor) -> Tensor:
    return h + F.gelu(h @ D + d, approximate="tanh") @ U + u


def compacter(size: int = 24, n: int = 4) -> Delta:
    """Two compacters a block, behind attention and behind the FFN (Karimi Mahabadi et al., 2021)."""
    return Compacter(size, n).at(BOTH)


def compacter_pp(size: int = 24, n: int = 4) -> Delta:
    """Compacter++: one compacter a block, behind the FFN (Karimi Mahabadi et al., 2021)."""
    return Compacter(size, n).at("ffn.down:out")
