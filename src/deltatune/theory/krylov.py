"""Krylov methods on operators that are never a matrix: eigenvalues by Lanczos, linear systems by conjugate gradients.

    Lanczos: A Q_m = Q_m T_m + b_m q_(m+1) e_m^T        T_m [m, m] tridiagonal; its eigenvalues approach the extreme ones of A
    CG: A x = b        x_k minimises (x - x*)^T A (x - x*) over span{b, A b, ..., A^(k-1) b}

Lanczos orthogonalises against all vectors before, twice, so that no eigenvalue appears again as its own ghost (Parlett, 1998,
chapter 13). CG: Hestenes and Stiefel, 1952.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from deltatune.errors import DeltaTuneError

Operator = Callable[[Tensor], Tensor]
BREAKDOWN = 1e-10  # of the operator's size: what is left of a new direction that the ones before span


@dataclass(frozen=True)
class Ritz:
    """Approximate eigenpairs: values [m] descending, unit vectors [n, m], and residuals [m] = |A v - value v|."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def lanczos(product: Operator, size: int, steps: int, seed: int = 0) -> Ritz:
    """Return the Ritz pairs of a symmetric A [size, size], given v -> A v in float64, after at most `size` steps.

    Keeps `steps` vectors. Where an invariant subspace is exhausted it goes on with a fresh random direction.
    """
    if steps < 1:
        raise DeltaTuneError(f"{steps} Lanczos steps find nothing; write at least 1.")
    generator = Generator().manual_seed(seed)
    steps = min(steps, size)
    Q = torch.zeros(size, steps + 1, dtype=torch.float64)
    T = torch.zeros(steps, steps, dtype=torch.float64)
    Q[:, 0] = _fresh(Q[:, :0], generator)
    scale, last = 0.0, 0.0
    for j in range(steps):
        w = product(Q[:, j])
        scale = max(scale, float(w.norm()))
        T[j, j] = Q[:, j] @ w
        w = _orthogonal(w, Q[:, : j + 1])
        last = float(w.norm())
        broken = last <= BREAKDOWN * scale
        last = 0.0 if broken else last
        if j + 1 == steps:
            break
        Q[:, j + 1] = _fresh(Q[:, : j + 1], generator) if broken else w / last
        T[j, j + 1] = T[j + 1, j] = last
    values, S = torch.linalg.eigh(T)
    return Ritz(values.flip(0), Q[:, :steps] @ S.flip(1), last * S[-1].abs().flip(0))


def _orthogonal(w: Tensor, Q: Tensor) -> Tensor:
    for _ in range(2):
        w = w - Q @ (Q.mT @ w)
    return w


def _fresh(Q: Tensor, generator: Generator) -> Tensor:
    w = _orthogonal(torch.randn(Q.shape[0], generator=generator, dtype=torch.float64), Q)
    return w / w.norm()


def conjugate_gradients(product: Operator, b: Tensor, tolerance: float = 1e-9, steps: int = 500) -> Tensor:
    """Return an x [n] with A x = b, given v -> A v for a symmetric A [n, n] without negative eigenvalues, b [n] in its range.

    Raises `DeltaTuneError` when |A x - b| is not below `tolerance` of |b| after `steps` steps.
    """
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    start = norm = float(b @ b)
    for _ in range(steps):
        if norm <= tolerance**2 * start:
            return x
        q = product(p)
        step = norm / float(p @ q)
        x, r = x + step * p, r - step * q
        norm, before = float(r @ r), norm
        p = r + norm / before * p
    if norm <= tolerance**2 * start:
        return x
    raise DeltaTuneError(
        f"the projection is not found after {steps} steps (a share {(norm / start) ** 0.5:.1e} of it is left): the family's "
        "directions are nearly dependent; use fewer of them."
    )
