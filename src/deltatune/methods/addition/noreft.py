"""NoReFT: LoReFT without the constraint that its basis is orthonormal (Wu et al., 2024, arXiv:2404.03592, appendix).

    h' = h + W_2^T (W_1 h + b - W_2 h)        W_1, W_2: [rank, d]   b: [rank]

W_1 starts uniform (Kaiming), W_2 and b at zero, so the delta starts neutral. Every position is edited;
`AtPositions(NoReFT(), first=4)` edits some. Parameters: 2 rank d + rank a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Init, Zeros
from deltatune.methods._reft import TwoBases


@dataclass(frozen=True)
class NoReFT(TwoBases):
    """Representation fine-tuning without orthogonality: h' = h + W_2^T (W_1 h + b - W_2 h) (Wu et al., 2024)."""

    rank: int = 4
    init: Init = Zeros()

    def stream(self, p: Any, h: Tensor) -> Tensor:
        return h + F.linear(h, p.W1 - p.W2, p.b) @ p.W2
