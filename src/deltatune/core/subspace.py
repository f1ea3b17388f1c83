"""Changes of one module as linear maps: in full or as a product of factors, their spans, and the angles between two spans.

    angles = arccos of the singular values of U_a^T U_b, ascending        U an orthonormal basis of a span

Small angles come from sines, which lose no digits there (Björck and Golub, 1973).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1e-6  # singular values below this share of the largest one are rounding of float32 factors

Svd = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Dense:
    """A change in full, float64 of any shape."""

    change: Tensor

    def minus(self, other: Dense) -> Dense:
        """Return the difference."""
        return Dense(self.change - other.change)

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(self.change.norm())

    def svd(self) -> Svd | None:
        """Return U, S and V^T of a matrix, None of anything else."""
        return torch.linalg.svd(self.change, full_matrices=False) if self.change.dim() == 2 else None


@dataclass(frozen=True)
class Product:
    """A change B A as its float64 factors, B [d_out, r] and A [r, d_in], which are never multiplied out."""

    B: Tensor
    A: Tensor

    def plus(self, other: Product) -> Product:
        """Return the sum."""
        return Product(torch.cat([self.B, other.B], 1), torch.cat([self.A, other.A]))

    def minus(self, other: Product) -> Product:
        """Return the difference."""
        return self.plus(Product(-other.B, other.A))

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return float(self._core()[1].norm())

    def svd(self) -> Svd | None:
        """Return U, S and V^T of the product."""
        Q, M, P = self._core()
        U, S, Vt = torch.linalg.svd(M, full_matrices=False)
        return Q @ U, S, Vt @ P.mT

    def _core(self) -> Svd:
        """Return Q, M and P with B A = Q M P^T, Q and P orthonormal."""
        (Q, R), (P, T) = torch.linalg.qr(self.B), torch.linalg.qr(self.A.mT)
        return Q, R @ T.mT, P


def spans(svd: Svd) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of the columns' and of the rows' span, [d_out, r] and [d_in, r], r the numerical rank."""
    U, S, Vt = svd
    rank = int((S / S[:1].clamp(min=torch.finfo(S.dtype).tiny) > NOISE).sum())
    return U[:, :rank], Vt[:rank].mT


def angles(U: Tensor, V: Tensor) -> tuple[float, ...]:
    """Return the principal angles in radians, ascending, between the spans of orthonormal columns.

    Empty when one spans nothing, and when together they have more dimensions than the space, so that they meet anyway.
    """
    if U.shape[1] < V.shape[1]:
        U, V = V, U
    if not V.shape[1] or U.shape[1] + V.shape[1] > U.shape[0]:
        return ()
    inside = U.mT @ V
    cosines = torch.linalg.svdvals(inside).clamp(max=1)
    sines = torch.linalg.svdvals(V - U @ inside).clamp(max=1).flip(0)
    return tuple(torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos()).tolist())
