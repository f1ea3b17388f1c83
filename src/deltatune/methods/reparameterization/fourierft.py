"""FourierFT: a change of a weight with few Fourier coefficients (Gao et al., 2024, arXiv:2405.03003).

    W' = W + scale Re(F^-1(S))        S: [d_out, d_in], S[idx] = c, 0 elsewhere        c, idx: [entries]

F^-1 is the inverse discrete Fourier transform in two dimensions (with its 1 / (d_in d_out)). idx are random entries,
regenerated from the seed, other ones at every site. c starts at zero, so that the delta starts neutral; the paper
starts it N(0, 1) (`init=Normal(1.0)`). Parameters: entries a site.

c learns `rate` times as fast as the recipe says: the authors train it at 6e-2 to 1e-1 where LoRA has 4e-4 to 5e-4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core.leaf import Init, Zeros
from deltatune.methods._entries import SparseSpectrum, scatter


@dataclass(frozen=True)
class FourierFT(SparseSpectrum):
    """Fourier transform finetuning: W' = W + scale Re(F^-1(S)), S sparse (Gao et al., 2024)."""

    entries: int = 1000
    scale: float = 150.0
    init: Init = Zeros()
    rate: float = 100.0

    def change(self, p: Any, d_out: int, d_in: int) -> Tensor:
        wide = p.c.to(torch.promote_types(p.c.dtype, torch.float32))  # there is no Fourier transform of bfloat16
        return (self.scale * torch.fft.ifft2(scatter(wide, p.idx, d_out, d_in)).real).to(p.c.dtype)
