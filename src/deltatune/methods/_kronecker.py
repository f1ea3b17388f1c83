"""Kronecker products: the two widths that make one, and the product with a vector that never builds the matrix."""

from __future__ import annotations

import math

from torch import Tensor


def split(width: int, factor: int = -1) -> tuple[int, int]:
    """Return (m, n) with m n = width: m = factor if it divides, else the largest divisor up to it and sqrt(width)."""
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = math.isqrt(width) if factor < 1 else min(factor, math.isqrt(width))
    m = next(n for n in range(most, 0, -1) if width % n == 0)
    return m, width // m


def kron_linear(x: Tensor, C: Tensor, *factors: Tensor) -> Tensor:
    """Return x (C kron D)^T [..., j k] for x [..., m n], C [j, m] and D [k, n] the product of `factors`."""
    z = x.unflatten(-1, (C.shape[1], -1))
    for factor in reversed(factors):
        z = z @ factor.mT
    return (C @ z).flatten(-2)
