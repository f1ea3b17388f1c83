"""C3A: a change of a weight made of circulant blocks (Chen et al., 2025, arXiv:2407.19342).

    W' = W + C / d_in        C: blocks C_ij [block, block], C_ij[t, s] = w_ij[(s - t) mod block]

so x C^T is a sum of circular correlations, done by Fourier transforms in O(d log d) a row of blocks. w: [d_out / block,
d_in / block, block] starts at zero, so that the delta starts neutral; the paper starts it uniform (Xavier:
`init=XavierUniform()`). Parameters: d_in d_out / block a site.

w learns `rate` times as fast as the recipe says, as it is divided by d_in (peft advises 1e-1); the
default is ours, chosen on dev data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core.leaf import Init, Leaf, Zeros
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.methods._sizes import check_divides, check_least, fitting

LARGEST = 256  # the size that a block has by default where the widths allow it


@dataclass(frozen=True)
class C3A(OnLinear):
    """Circular convolution adaptation: W' = W + C / d_in, C block-circulant (Chen et al., 2025)."""

    block: int | None = None
    init: Init = Zeros()
    rate: float = 300.0

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, block=1 if self.block is None else self.block)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        block = self.block or fitting(LARGEST, site.d_in, site.d_out)
        for width in (site.d_in, site.d_out):
            check_divides(self, "block", block, width, site)
        return {"w": Leaf((site.d_out // block, site.d_in // block, block), self.init, rate=self.rate)}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        t = torch.arange(p.w.shape[-1], device=p.w.device)
        C = p.w[..., (t - t[:, None]) % p.w.shape[-1]]
        return W + (C.transpose(1, 2).reshape(W.shape) / W.shape[1]).to(W.dtype)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        if not x.numel():  # no Fourier transform of nothing either
            return y
        wide = torch.promote_types(y.dtype, torch.float32)  # there is no Fourier transform of bfloat16
        blocks = torch.fft.rfft(x.to(wide).unflatten(-1, (-1, p.w.shape[-1])))
        mixed = torch.einsum("...nf,mnf->...mf", blocks, torch.fft.rfft(p.w.to(wide)).conj())
        return y + (torch.fft.irfft(mixed, n=p.w.shape[-1]).flatten(-2) / x.shape[-1]).to(y.dtype)
