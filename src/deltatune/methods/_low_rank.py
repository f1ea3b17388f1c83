"""Low-rank changes: a weight plus a product of two factors, written down in full and by its cheap road."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Given


def changed(W: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return W + scale B A for A [r, d_in] and B [d_out, r]."""
    return W + scale * (B @ A).to(W.dtype)


def routed(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return y + scale (x A^T) B^T, which needs no matrix of the weight's size; A and B may be each row's own [rows, ...]."""
    h = x.to(y.dtype) @ A.mT
    if B.dim() == 2:
        return y + (h @ B.mT) * scale
    if torch.is_grad_enabled():
        return torch.baddbmm(y, h, B.mT, alpha=scale)
    return y.baddbmm_(h, B.mT, alpha=scale)  # the layer's own output, which nobody else reads: it saves a copy


def affine(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return x W^T + b; W may be each row's own [rows, m, n], with b [rows, 1, m] and x [rows, k, n]."""
    return torch.baddbmm(b, x, W.mT) if W.dim() == 3 else F.linear(x, W, b)


def largest(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `rank` largest singular triplets of M [m, n]: U [m, rank], S [rank] and V^T [rank, n]."""
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank], S[:rank], Vt[:rank]


def decomposed(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of a site's weight, U [d_out, k], S [k] and V^T [k, d_in], computed once a site."""
    return given.once("svd", lambda: torch.linalg.svd(given.weight, full_matrices=False))


def principal(given: Given, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `rank` largest singular triplets of a site's weight."""
    U, S, Vt = decomposed(given)
    return U[:, :rank], S[:rank], Vt[:rank]


def halves(U: Tensor, S: Tensor, Vt: Tensor) -> tuple[Tensor, Tensor]:
    """Return A = sqrt(S) V^T and B = U sqrt(S), so that B A = U S V^T and neither factor outweighs the other."""
    root = S.sqrt()
    return root[:, None] * Vt, U * root
