"""What the reference tests share: a tiny model with a delta moved away from its start, and what the two roads give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES, busy

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def moved(name: str, delta: Any, size: float = 0.2) -> tuple[nn.Module, dt.Weights]:
    """Return a tiny model and weights of `delta` for it, every tensor moved by normal noise of `size`."""
    model = BACKBONES[name]()
    return model, busy(dt.init(delta, model), seed=11, size=size)


def by_path(model: nn.Module, weights: dt.Weights) -> dict[str, dict[str, Tensor]]:
    """Return {address of a site: {leaf: tensor}} of a delta of one term."""
    found: dict[str, dict[str, Tensor]] = {}
    for placement in dt.sites(model, weights.delta).placements:
        own = {leaf: weights.tensors[placement.name(leaf)] for leaf in placement.leaves}
        found.setdefault(placement.site.address, {}).update(own)
    return found


def copied(target: Tensor, source: Tensor) -> None:
    """Copy `source` into `target`, which must have its shape."""
    assert target.shape == source.shape
    with torch.no_grad():
        target.copy_(source)


def scores(model: nn.Module, **given: Any) -> Tensor:
    """Return the scores of the model's standard batch at every position that is not padding, [positions, pieces]."""
    batch: dict[str, Any] = {**tiny.batch(model), **given}
    logits = model(**batch).logits
    return logits.flatten(0, 1) if "decoder_input_ids" in batch else logits[tiny.batch(model)["attention_mask"].bool()]


def batch_of(name: str) -> dict[str, Tensor]:
    """Return the standard batch of a tiny model."""
    return tiny.batch(BACKBONES[name]())
