"""DiReFT: LoReFT without orthogonality and without the difference, a low-rank map of the hidden state (Wu et al., 2024,
arXiv:2404.03592).

    h' = h + W_2^T (W_1 h + b)        W_1, W_2: [rank, d]   b: [rank]

W_1 starts uniform (Kaiming), W_2 and b at zero, so the delta starts neutral. Every position is edited;
`AtPositions(DiReFT(), first=4)` edits some. Parameters: 2 rank d + rank a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Init, Zeros
from deltatune.methods._reft import TwoBases


@dataclass(frozen=True)
class DiReFT(TwoBases):
    """Direct representation fine-tuning: h' = h + W_2^T (W_1 h + b) (Wu et al., 2024)."""

    rank: int = 4
    init: Init = Zeros()

    def stream(self, p: Any, h: Tensor) -> Tensor:
        return h + F.linear(h, p.W1, p.b) @ p.W2
