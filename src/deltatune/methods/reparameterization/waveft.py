"""WaveFT: a change of a weight with few wavelet coefficients (Bilican et al., 2025, arXiv:2505.12532).

    W' = W + scale H^-1(S)        S: [d_out, d_in], S[idx] = c, 0 elsewhere        c, idx: [entries]

H^-1 is one level of the inverse Haar transform in two dimensions: S = [[a, h], [v, d]] gives every 2 x 2 patch of the
change, (a + h + v + d, a + h - v - d; a - h + v - d, a - h - v + d) / 2. An odd width is padded with one zero, and the
result cut. idx are random entries, regenerated from the seed, other ones at every site. c starts at zero, so the delta
starts neutral. Parameters: entries a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Init, Zeros
from deltatune.methods._entries import SparseSpectrum, scatter


@dataclass(frozen=True)
class WaveFT(SparseSpectrum):
    """Wavelet finetuning: W' = W + scale H^-1(S), S sparse (Bilican et al., 2025)."""

    entries: int = 2592
    scale: float = 25.0
    init: Init = Zeros()

    def change(self, p: Any, d_out: int, d_in: int) -> Tensor:
        S = F.pad(scatter(p.c, p.idx, d_out, d_in), (0, d_in % 2, 0, d_out % 2))
        (a, h), (v, d) = (half.chunk(2, 1) for half in S.chunk(2, 0))
        patches = torch.stack((a + h + v + d, a + h - v - d, a - h + v - d, a - h - v + d)).unflatten(0, (2, 2))
        change = patches.permute(2, 0, 3, 1).flatten(2, 3).flatten(0, 1)  # [row, parity, column, parity]
        return change[:d_out, :d_in] * (self.scale / 2)
