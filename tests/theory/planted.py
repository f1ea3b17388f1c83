"""Changes of known shape, planted into tiny backbones, and batches with labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from tests import tiny


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(rows: int, columns: int, values: list[float], seed: int = 0) -> Tensor:
    """A matrix with the given singular values, in float64."""
    U, V = (torch.linalg.qr(numbers(n, len(values), seed=seed + i))[0] for i, n in enumerate((rows, columns)))
    return (U * torch.tensor(values, dtype=torch.float64)) @ V.mT


def changed(model: nn.Module, where: str, change: Callable[[str, Tensor], Tensor]) -> dt.Weights:
    """Weights of Full at `where` whose values are theta + change(leaf name, theta)."""
    weights = dt.init(dt.Full().at(where), model)
    return replace(weights, tensors={n: (t.double() + change(n, t)).float() for n, t in weights.tensors.items()})


def matrix(change: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    """A change of matrices alone."""
    return lambda name, t: change(t) if t.dim() == 2 else torch.zeros(t.shape)


def busy(delta: Any, model: nn.Module, size: float = 0.1, seed: int = 0) -> dt.Weights:
    """Weights of a delta, all trained leaves moved away from their start."""
    weights = dt.init(delta, model)
    generator = torch.Generator().manual_seed(seed)
    moved = {n: t + size * torch.randn(t.shape, generator=generator) for n, t in weights.tensors.items()}
    return replace(weights, tensors=moved)


def batches(model: nn.Module, count: int = 2) -> list[dict[str, Tensor]]:
    """Batches of a tiny transformers model with labels; padding has none."""
    found = []
    for seed in range(count):
        batch = tiny.batch(model)
        ids = torch.randint(5, tiny.VOCABULARY, batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed))
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), ids, batch["input_ids"])
        decoder = batch.pop("decoder_input_ids", None)
        labels = ids.masked_fill(~batch["attention_mask"].bool(), -100) if decoder is None else ids[:, :4].contiguous()
        found.append({**batch, "labels": labels})
    return found
