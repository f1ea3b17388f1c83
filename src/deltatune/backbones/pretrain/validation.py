"""The loss on held-out documents: in nats a token, and for next-token models in bits a byte as well."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from deltatune.backbones.pretrain.mixture import Mixture
from deltatune.backbones.pretrain.objectives import Batch, NextToken, Objective

ROWS = 16


def validate(
    model: nn.Module, mixture: Mixture, objective: Objective, rows: int, lengths: np.ndarray, autocast: torch.autocast
) -> dict[str, Any]:
    """Mean loss over the first `rows` held-out rows, in all and for each text.

    nats per token = sum of -log p / targets; bits per byte = sum of -log p / (log 2 x bytes of those targets), with
    `lengths` int64 [vocabulary] giving each token's bytes. The same rows and the same noise every time.
    """
    nats: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    device = next(model.parameters()).device
    rows = min(rows, mixture.rows)
    for start in range(0, rows, ROWS):
        windows, names = mixture.read(start, min(ROWS, rows - start))
        batch = objective.batch(windows, np.random.default_rng([mixture.seed, 2000, start]))
        batch = {key: value.to(device) for key, value in batch.items()}
        losses, targets = _row_losses(model, batch, objective, autocast)
        for name, loss, window in zip(names, losses, windows, strict=True):
            nats[name] += loss
            tokens[name] += targets
            size[name] += int(lengths[window].sum())
    result: dict[str, Any] = {"loss": sum(nats.values()) / sum(tokens.values()), "targets": sum(tokens.values())}
    if isinstance(objective, NextToken):
        result["bits_per_byte"] = sum(nats.values()) / (math.log(2) * sum(size.values()))
    result["texts"] = {name: nats[name] / tokens[name] for name in sorted(nats)}
    return result


def _row_losses(
    model: nn.Module, batch: Batch, objective: Objective, autocast: torch.autocast
) -> tuple[list[float], int]:
    """Summed loss of each row, and the number of targets in a row."""
    with torch.no_grad(), autocast:
        logits = model(**batch).logits.float()
    labels = batch["labels"]
    if isinstance(objective, NextToken):
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
    return losses.tolist(), labels.shape[1]
