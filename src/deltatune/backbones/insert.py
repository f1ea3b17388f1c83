"""Putting positions into padded rows: behind each row's own padding, and out again."""

from __future__ import annotations

import torch
from torch import Tensor


def starts(mask: Tensor | None, like: Tensor, at: int) -> Tensor:
    """Return where each row's prompt goes [batch, 1]: `at` tokens behind the first one that is not padding."""
    if mask is None:
        return torch.full((like.shape[0], 1), at, device=like.device)
    return mask.ne(0).int().argmax(1, keepdim=True) + at


def insert(rows: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """Return rows [batch, length, ...] with new [batch, extra, ...] put in at `start` [batch, 1]."""
    length, extra = rows.shape[1], new.shape[1]
    at = torch.arange(length + extra, device=rows.device)[None]
    source = torch.where(at < start, at, torch.where(at < start + extra, length + at - start, at - extra))
    return _pick(torch.cat([rows, new], 1), source)


def remove(rows: Tensor, extra: int, start: Tensor) -> Tensor:
    """Undo `insert`: return rows [batch, length, ...] without the `extra` positions from `start` [batch, 1]."""
    at = torch.arange(rows.shape[1] - extra, device=rows.device)[None]
    return _pick(rows, torch.where(at < start, at, at + extra))


def _pick(rows: Tensor, source: Tensor) -> Tensor:
    source = source.expand(rows.shape[0], -1)
    shape = (*source.shape, *rows.shape[2:])
    return rows.gather(1, source.reshape(*source.shape, *[1] * (rows.dim() - 2)).expand(shape))
