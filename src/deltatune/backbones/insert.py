"""Putting positions into padded rows: behind each row's own padding, and out again."""

from __future__ import annotations

import torch
from torch import Tensor


def starts(mask: Tensor | None, like: Tensor, at: int) -> Tensor:
    """Return where each row's prompt goes [batch, 1]: `at` tokens behind the first one that is not padding."""
    if mask is None:
        return torch.full((like.shape[0], 1), at, device=like.device)
    return mask.ne(0).int().argmax(1, keepdim=True) + at


def insert(rows: Tensor, new: Tensor, start: Tensor, own: Tensor) -> Tensor:
    """Return rows [batch, length, ...] with the first `own` [batch, 1] of new [batch, extra, ...] put in at `start` [batch, 1].

    All rows grow by `extra`: what a row does not take of its own `new` stands behind its end.
    """
    length, extra = rows.shape[1], new.shape[1]
    at = torch.arange(length + extra, device=rows.device)[None]
    behind = torch.where(
        at < length + own, at - own, at
    )  # the text moves by what is put in; the rest of `new` follows it
    source = torch.where(at < start, at, torch.where(at < start + own, length + at - start, behind))
    return _pick(torch.cat([rows, new], 1), source)


def remove(rows: Tensor, extra: int, start: Tensor, own: Tensor) -> Tensor:
    """Undo `insert`: return rows [batch, length, ...] without the `own` positions from `start`, and without what stands behind the end."""
    at = torch.arange(rows.shape[1] - extra, device=rows.device)[None]
    return _pick(rows, torch.where(at < start, at, at + own))


def _pick(rows: Tensor, source: Tensor) -> Tensor:
    source = source.expand(rows.shape[0], -1)
    shape = (*source.shape, *rows.shape[2:])
    return rows.gather(1, source.reshape(*source.shape, *[1] * (rows.dim() - 2)).expand(shape))
