"""Stages: deltas that were trained one after the other, each on the frozen ones before it, as one delta.

    delta = delta_1 + ... + delta_n        F(theta, delta) = F(theta, delta_1, ..., delta_n)

The sum has one seed, from which its seeded leaves start; those that a stage had otherwise travel in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from deltatune.core.attach import Attachment
from deltatune.core.delta import Delta, place
from deltatune.core.fit import check_backbone, check_tensors
from deltatune.core.weights import Weights, fingerprint, generate
from deltatune.errors import DeltaTuneError


def join(model: nn.Module, *stages: Weights | Attachment, check: bool = True) -> Weights:
    """Return one delta's weights that do what the stages do when they are attached in this order; the model is not touched.

    Raises `DeltaTuneError` when there are none, or when one was made for another backbone (`check=False` allows other values).
    """
    if not stages:
        raise DeltaTuneError("there is nothing to join; write join(model, first, second).")
    parts = [stage.weights if isinstance(stage, Attachment) else stage for stage in stages]
    delta, backbone = Delta(), fingerprint(model)
    notes: dict[str, str] = {}
    trained: dict[str, Tensor] = {}
    untrained: dict[str, Tensor] = {}
    for part in parts:
        check_backbone(part.backbone, backbone, check)
        placements = place(model, part.delta)
        check_tensors(part, placements)
        first = len(delta.terms)
        trained |= _behind(first, part.tensors)
        untrained |= _behind(first, {**generate(model, placements, part.seed, "seeded", {}), **part.fixed})
        delta, notes = delta + part.delta, {**notes, **part.notes}
    again = generate(model, place(model, delta), parts[0].seed, "seeded", {})
    fixed = {name: t for name, t in untrained.items() if name not in again or not torch.equal(t, again[name])}
    return replace(parts[0], delta=delta, tensors=trained, fixed=fixed, notes=notes)


def _behind(terms: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that they have when their terms stand behind others."""
    named = ((*name.partition("."), tensor) for name, tensor in tensors.items())
    return {f"{int(term) + terms}.{rest}": tensor for term, _, rest, tensor in named}
