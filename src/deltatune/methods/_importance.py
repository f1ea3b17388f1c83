"""Importance of parameters while they are trained: how far the loss would move without them (Zhang et al., 2022, arXiv:2206.12562).

s(w) = I(w) U(w)        I: the running mean of |w dloss/dw|   U: the running mean of ||w dloss/dw| - I|
"""

from __future__ import annotations

import torch
from torch import Tensor


def observed(w: Tensor, means: Tensor, decay: float) -> Tensor:
    """Return the running means [2, *shape] of I and U after one more step; without a gradient, as they are."""
    if w.grad is None:
        return means
    now = (w * w.grad).abs()
    mean = decay * means[0] + (1 - decay) * now
    return torch.stack([mean, decay * means[1] + (1 - decay) * (now - mean).abs()])


def importance(means: Tensor) -> Tensor:
    """Return s of every entry, of the shape of w."""
    return means[0] * means[1]
