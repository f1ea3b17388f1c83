"""Low-rank changes: a weight plus a product of two factors, written down in full and by its cheap road."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from deltatune.core.fused import Remake, fusible, own, remake
from deltatune.core.leaf import Given
from deltatune.core.method import Base
from deltatune.core.products import Light


def changed(W: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return W + scale B A for A [r, d_in] and B [d_out, r]."""
    return W + scale * (B @ A).to(W.dtype)


def routed(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, base: Base | None = None) -> Tensor:
    """Return y + scale (x A^T) B^T, which needs no matrix of the weight's size; A and B may be each row's own [rows, ...].

    With `base`, y is what that layer made of x, and the gradient of x is computed for both at once.
    """
    x = x.to(y.dtype)
    if B.dim() == 3:
        h = x @ A.mT
        return torch.baddbmm(y, h, B.mT, alpha=scale) if torch.is_grad_enabled() else y.baddbmm_(h, B.mT, alpha=scale)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not fusible()):
        return y + (x @ A.mT @ B.mT) * scale
    if torch.is_grad_enabled():
        W = base.plain if base is not None and A.requires_grad and x.requires_grad else None
        if W is not None:
            return cast(Tensor, Both.apply(x, y.detach(), A, B, scale, W, remake(x)))
        h = cast(Tensor, Down.apply(x, A, remake(x) if A.requires_grad else None))
        return cast(Tensor, Up.apply(h, y, B, scale))
    return _added(y, A @ _flat(x).mT, B, y.is_contiguous(), scale)


class Down(Function):
    """h = A x^T, [r, n] for x [..., d] of n rows; x is kept only where A is trained and nothing makes it again.

    The short side stands in front: [r, d] [d, n] runs twice as fast on a CPU as [n, d] [d, r].
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, again: Remake | None) -> Tensor:
        ctx.shape, ctx.again = x.shape, again
        ctx.save_for_backward(A, *(() if again or not A.requires_grad else (x,)))
        with Light(_flat(x)) as (flat,):
            return A.to(flat.dtype) @ flat.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (A, *kept) = grads, ctx.saved_tensors
        to_x, to_A, _ = ctx.needs_input_grad
        gx = (g.mT @ A.to(g.dtype)).view(ctx.shape) if to_x else None
        gA = g @ _flat(kept[0] if kept else ctx.again()).to(g.dtype) if to_A else None
        return gx, gA, None


class Up(Function):
    """y + scale h^T B^T for h [r, n] and y [..., d] of n rows, written over y where it can be."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        new = _added(y, h, B, own(y), scale)
        if new is y:
            ctx.mark_dirty(y)
        ctx.save_for_backward(h, B)
        return new

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (h, B) = grads, ctx.saved_tensors
        to_h, to_y, to_B, _ = ctx.needs_input_grad
        with Light(_flat(g)) as (flat,):
            gh = B.to(flat.dtype).mT @ flat.mT * ctx.scale if to_h else None
            gB = (h.to(flat.dtype) * ctx.scale @ flat).mT if to_B else None
        return gh, g if to_y else None, gB, None


class Both(Function):
    """y + scale (x A^T) B^T for y = x W^T + b, whose own backward it takes over: g W + scale g B A in one place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float, W: Tensor, again: Remake | None
    ) -> Tensor:
        with Light(_flat(x)) as (flat,):
            h = A.to(flat.dtype) @ flat.mT * scale
            new = _added(y, h, B, y.is_contiguous())
        ctx.shape, ctx.scale, ctx.again = x.shape, scale, again
        ctx.save_for_backward(h, A, B, W, *(() if again else (x,)))
        return new

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (h, A, B, W, *kept) = grads, ctx.saved_tensors
        x, through = _flat(kept[0] if kept else ctx.again()), _flat(g) @ W
        with Light(_flat(g), x) as (flat, x):
            A, B = A.to(x.dtype), B.to(x.dtype)
            gh = B.mT @ flat.mT * ctx.scale
            if torch.is_grad_enabled():
                h, gx = A @ x.mT * ctx.scale, through + (gh.mT @ A).to(through.dtype)
            else:
                gx = _added(through, gh, A.mT, True)
            return gx.view(ctx.shape), None, gh @ x, (h.to(x.dtype) @ flat).mT, None, None, None


def _added(y: Tensor, h: Tensor, B: Tensor, over: bool, scale: float = 1.0) -> Tensor:
    """Return y + scale h^T B^T for h [r, n], written `over` y or into a new tensor."""
    flat = _flat(y)
    if h.dtype != y.dtype:
        change = h.mT @ B.to(h.dtype).mT
        new = flat.add_(change, alpha=scale) if over else flat.add(change, alpha=scale).to(y.dtype)
        return y if over else new.view(y.shape)
    if over:
        flat.addmm_(h.mT, B.mT, alpha=scale)
        return y
    return torch.addmm(flat, h.mT, B.mT, alpha=scale).view(y.shape)


def _flat(x: Tensor) -> Tensor:
    """Return x [..., d] as [n, d]."""
    return x.reshape(-1, x.shape[-1])


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
