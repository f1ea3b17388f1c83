"""A basis in which several weights have orthogonal columns at once, or nearly (Ponnapalli et al., 2011, doi:10.1371/journal.pone.0028072).

    W_i = U_i diag(L_i) V^T        V = T^T Z, Q T the stacked weights, Z the eigenvectors of the mean of (Q_i^T Q_i + ridge)^-1

V is oblique: U_i diag(L_i) = W_i V^-T. Where the stack has not the rank of its columns, V holds its right singular vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE = 1e-3


def joint(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return V and V^-T, [d_in, d_in] each, of weights [d_out_i, d_in]."""
    stack = torch.cat(list(weights))
    if stack.shape[0] >= stack.shape[1]:
        V = _oblique(stack, [len(W) for W in weights])
        R = inverse(V)
        if R is not None:
            return V, R
    V = torch.linalg.svd(stack, full_matrices=True).Vh.mT.contiguous()
    return V, V


def _oblique(stack: Tensor, rows: list[int]) -> Tensor:
    Q, T = torch.linalg.qr(stack)
    ridge = RIDGE * torch.eye(len(T))
    inverses = [torch.linalg.inv(q.mT @ q + ridge) for q in Q.split(rows)]
    mean = sum(inverses[1:], inverses[0]) / len(inverses)
    return T.mT @ torch.linalg.eigh(mean).eigenvectors


def inverse(V: Tensor) -> Tensor | None:
    """Return V^-T, or None where single precision cannot hold it."""
    R = torch.linalg.inv_ex(V.double()).inverse.mT.float()
    exact = (R.mT @ V - torch.eye(len(V))).abs().max() < 1e-2  # false for NaN
    return R.contiguous() if exact else None
