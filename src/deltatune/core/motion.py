"""Laws of motion: what a method adds to training besides its leaves. Each is a no-op for methods that have none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from deltatune.core.attach import Attachment
from deltatune.core.delta import Placement
from deltatune.core.leaves import tensors_of
from deltatune.core.method import Bag, Method


def penalty(attachment: Attachment) -> Tensor | None:
    """Return the sum of the methods' penalties over all sites, a scalar to add to the loss, or None when there is none."""
    own = [p for p in attachment.placements if type(p.method.computes).penalty is not Method.penalty]
    terms = [p.method.computes.penalty(tensors_of(p, attachment.leaves)(torch.float32)) for p in own]
    some = [term for term in terms if term is not None]
    return torch.stack(some).sum() if some else None


@contextmanager
def drawn(attachment: Attachment, seed: int) -> Iterator[None]:
    """The scope of one training step: untrained leaves that a method draws have drawn values, and their own again after it."""
    generator = Generator().manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for placement in (p for p in attachment.placements if type(p.method).draw is not Method.draw):
            live = _live(attachment, placement)
            for leaf, value in placement.method.draw(Bag(live), generator).items():
                kept.append((live[leaf], live[leaf].clone()))
                live[leaf].copy_(value)
    try:
        yield
    finally:
        for tensor, before in kept:
            tensor.copy_(before)


@torch.no_grad()
def advance(attachment: Attachment, step: int, steps: int) -> None:
    """Let every method change its own leaves after optimizer step `step` of `steps`, with the gradients still in place."""
    terms: dict[int, list[Placement]] = {}
    for placement in (p for p in attachment.placements if type(p.method).step is not Method.step):
        terms.setdefault(placement.term, []).append(placement)
    for placements in terms.values():
        live = [_live(attachment, placement) for placement in placements]
        changes = placements[0].method.step([Bag(leaves) for leaves in live], step, steps)
        for leaves, change in zip(live, changes or [], strict=False):
            for leaf, value in change.items():
                leaves[leaf].copy_(value)


def rates(attachment: Attachment) -> dict[nn.Parameter, float]:
    """Return each trained tensor's learning rate as a multiple of the recipe's.

    A loop of one's own gives the optimizer a group for each: `{"params": [tensor], "lr": lr * rate}`.
    """
    declared = {p.name(leaf): d.rate for p in attachment.placements for leaf, d in p.leaves.items()}
    return {tensor: declared[name] for name, tensor in attachment.named_parameters()}


def moving(attachment: Attachment) -> list[Tensor]:
    """Return the stored leaves that are not trained: `advance` may change them, so a checkpoint holds them."""
    found: dict[int, Any] = {}
    for placement in attachment.placements:
        live = _live(attachment, placement)
        found |= {id(live[leaf]): live[leaf] for leaf, d in placement.leaves.items() if d.kind == "stored"}
    return list(found.values())


def _live(attachment: Attachment, placement: Placement) -> dict[str, Tensor]:
    return tensors_of(placement, attachment.leaves).live()
