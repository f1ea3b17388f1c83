"""NF4: rounding to the 16 quantiles of a normal distribution, block by block (Dettmers et al., 2023, arXiv:2305.14314)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def nf4(W: Tensor, block: int) -> Tensor:
    """Return W rounded to 4 bits: in each run of `block` values, the nearest level times the largest magnitude."""
    flat = F.pad(W.flatten(), (0, -W.numel() % block)).view(-1, block)
    top = flat.abs().amax(1, keepdim=True)
    unit = flat / top.where(top > 0, 1.0)
    near = torch.bucketize(unit, (LEVELS[1:] + LEVELS[:-1]) / 2)
    return (LEVELS[near] * top).flatten()[: W.numel()].view_as(W)
