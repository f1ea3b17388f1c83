"""VB-LoRA: LoRA's factors put together from a bank of vectors that all sites share (Li et al., 2024, arXiv:2405.15179).

    W' = W + B A        each run of `size` values in a row of A, and in a column of B, is
                        sum_k softmax(l_k) v_k over the `top` largest of its logits l: [vectors]   v: [vectors, size]

Where `size` does not divide a width, the last run of a row is cut. The bank starts U(-0.02, 0.02) and the logits
N(0, 0.1^2), so the delta starts near neutral but not exactly. Parameters: rank (d_in + d_out) vectors / size a site
(runs rounded up), and vectors size in all. A trained delta needs only the `top` logits and their indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from deltatune.core.leaf import Init, Leaf, Normal, Uniform
from deltatune.core.method import Base, Law, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._low_rank import changed, routed
from deltatune.methods._sizes import check_least, check_rank


@dataclass(frozen=True)
class VBLoRA(OnLinear):
    """Vector-bank LoRA: W' = W + B A, A and B mixed from shared vectors (Li et al., 2024)."""

    rank: int = 4
    vectors: int = 90
    size: int = 256
    top: int = 2
    logits: Init = Normal(0.1)
    bank: Init = Uniform(0.02)

    where = "{attn.{q,v},cross.{q,v}?}"
    breaks: ClassVar[dict[Law, str]] = {"identity": "both factors start from the bank, which is not zero"}

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank, vectors=self.vectors, size=self.size, top=self.top)
        if self.top > self.vectors:
            raise DeltaTuneError(
                f"VBLoRA(top={self.top}) picks more vectors than vectors={self.vectors}; write a top of at most {self.vectors}."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_rank(self, self.rank, site)
        return {
            "A": Leaf((self.rank, -(-site.d_in // self.size), self.vectors), self.logits),
            "B": Leaf((-(-site.d_out // self.size), self.rank, self.vectors), self.logits),
            "v": Leaf((self.vectors, self.size), self.bank, scope="delta"),
        }

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return changed(W, *self._factors(p, *W.shape))

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return routed(x, y, *self._factors(p, y.shape[-1], x.shape[-1]))

    def _factors(self, p: Any, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
        A, B = self._mixed(p.A, p.v).flatten(1), self._mixed(p.B, p.v).mT.flatten(0, 1)
        return A[:, :d_in], B[:d_out]

    def _mixed(self, logits: Tensor, v: Tensor) -> Tensor:
        largest, index = logits.topk(self.top)
        return (largest.softmax(-1)[..., None] * v[index]).sum(-2)
