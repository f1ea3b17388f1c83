"""OSF: the minor part of a weight is trained, away from its major part (Nayak et al., 2025, arXiv:2504.07097).

    W' = W + (U diag(s) V - U_0 diag(s_0) V_0)        W = U_h S_h V_h + U_0 diag(s_0) V_0

U_h, S_h and V_h hold the `keep` largest singular values. U = U_0 + (I - U_h U_h^T)(u - U_0) and V = V_0 +
(v - V_0)(I - V_h^T V_h) for the trained u: [d_out, k] and v: [k, d_in], so that neither they nor their gradients have a
part in the major directions, which older tasks use. u, s, v start at U_0, s_0, V_0, so the delta starts neutral; these
and U_h, V_h travel with the weights. Parameters: k (d_in + d_out + 1) a site, k = (1 - keep) min(d_in, d_out).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._low_rank import decomposed


@dataclass(frozen=True)
class Singular(Init):
    """The left vectors, values or right vectors of the site's weight, the largest or the smallest ones."""

    of: Literal["U", "S", "V"]
    end: Literal["largest", "smallest"]

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        U, S, Vt = decomposed(given)
        count = shape[1] if self.of == "U" else shape[0]
        chosen = slice(None, count) if self.end == "largest" else slice(len(S) - count, None)
        return {"U": U[:, chosen], "S": S[chosen], "V": Vt[chosen]}[self.of]


@dataclass(frozen=True)
class OSF(OnLinear):
    """Orthogonal subspace fine-tuning: W' = W + U diag(s) V - U_0 diag(s_0) V_0, away from the rest (Nayak et al., 2025)."""

    keep: float = 0.5

    where = "{attn.{q,k,v,o},cross.{q,k,v,o}?,ffn.{gate?,up,down}}"

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise DeltaTuneError(f"OSF(keep={self.keep}) is not a share; write a number between 0 and 1, such as 0.5.")

    def leaves(self, site: Site) -> dict[str, Leaf]:
        whole = min(site.d_in, site.d_out)
        major = int(whole * self.keep)
        minor = whole - major
        if not major:
            raise DeltaTuneError(
                f"OSF(keep={self.keep}) keeps none of the {whole} directions of {site.path!r}; write keep={1 / whole:.3g} or more."
            )
        shapes: dict[Literal["U", "S", "V"], Shape] = {"U": (site.d_out, minor), "S": (minor,), "V": (minor, site.d_in)}
        trained = {of.lower(): Leaf(shape, Singular(of, "smallest")) for of, shape in shapes.items()}
        first = {f"{of}0": _kept(shape, Singular(of, "smallest")) for of, shape in shapes.items()}
        high = {"Uh": _kept((site.d_out, major), Singular("U", "largest"))}
        return {**trained, **first, **high, "Vh": _kept((major, site.d_in), Singular("V", "largest"))}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        U, V = _moved(p)
        return W + ((U * p.s) @ V - (p.U0 * p.S0) @ p.V0).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        # Two products rather than one of joined factors: at the start they are the same bits, so their difference is 0.
        U, V = _moved(p)
        x = x.to(y.dtype)
        return y + ((x @ V.mT) @ (U * p.s).mT - (x @ p.V0.mT) @ (p.U0 * p.S0).mT)


def _kept(shape: Shape, init: Init) -> Leaf:
    return Leaf(shape, init, trained=False, stored=True)


def _moved(p: Any) -> tuple[Tensor, Tensor]:
    """Return U [d_out, k] and V [k, d_in], without what training gave u and v of the major directions."""
    step_U, step_V = p.u - p.U0, p.v - p.V0
    return p.U0 + step_U - p.Uh @ (p.Uh.mT @ step_U), p.V0 + step_V - (step_V @ p.Vh.mT) @ p.Vh
