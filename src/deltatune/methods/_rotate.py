"""Rotations: skew matrices from their upper triangles, Cayley's map to orthogonal ones, their blocks on vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def triangle(size: int) -> int:
    """Return the number of free entries of a skew matrix."""
    return size * (size - 1) // 2


def skew(entries: Tensor, size: int) -> Tensor:
    """Return skew matrices [..., size, size] with upper triangles, row by row, `entries` [..., size (size - 1) / 2]."""
    i = torch.arange(size, device=entries.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    place = low * (2 * size - low - 1) // 2 + high - low - 1
    sign = torch.sign(i - i[:, None]).to(entries.dtype)  # 0 on the diagonal, whose place is another's
    return entries[..., place] * sign


def cayley(Q: Tensor) -> Tensor:
    """Return (I - Q) (I + Q)^-1, orthogonal for a skew Q; solved in float32 at least."""
    wide = Q.to(torch.promote_types(Q.dtype, torch.float32))
    eye = torch.eye(Q.shape[-1], dtype=wide.dtype, device=wide.device)
    return torch.linalg.solve(eye + wide, eye - wide, left=False).to(Q.dtype)


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """Return x [..., d] with block i of its last dimension times R[i], R [d / b, b, b] or [1, b, b] for all blocks."""
    blocks = x.unflatten(-1, (-1, R.shape[-1]))
    return torch.einsum("...nb,nbc->...nc", blocks, R.expand(blocks.shape[-2], -1, -1)).flatten(-2)
