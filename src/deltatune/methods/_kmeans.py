"""k-means: rows in groups around their means (Lloyd, 1982), the same at every call."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def cluster(rows: Tensor, groups: int, steps: int = 10) -> Tensor:
    """Return the group of each row, int64 [rows], after at most `steps` steps from `groups` of the rows chosen at random."""
    centres = rows[torch.randperm(len(rows), generator=Generator().manual_seed(0))[:groups]]
    group = torch.cdist(rows, centres).argmin(1)
    for _ in range(steps):
        centres = torch.stack([rows[group == g].mean(0) if (group == g).any() else centres[g] for g in range(groups)])
        group = torch.cdist(rows, centres).argmin(1)
    return group
