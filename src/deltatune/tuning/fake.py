"""Deltas whose tensors are fakes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltatune.core.attach import Attachment, enliven
from deltatune.core.delta import Placement, place
from deltatune.core.leaf import Given, Leaf
from deltatune.core.leaves import Leaves, key
from deltatune.core.site import anatomy
from deltatune.core.stored import Values
from deltatune.core.weights import Weights


def attach_fake(model: nn.Module, weights: Weights, device: torch.device) -> Attachment:
    """Attach a delta whose leaves have shapes and no values, so that no start is computed."""
    parts = anatomy(model)
    placements = place(model, weights.delta, parts)
    trained: dict[str, nn.Parameter] = {}
    others: dict[str, Tensor] = {}
    for placement in placements:
        for leaf, declared in placement.leaves.items():
            name = key(placement.name(leaf))
            if declared.trained:
                trained.setdefault(name, nn.Parameter(torch.empty(declared.shape, device=device)))
            else:
                dtype = _dtype(model, placement, declared)
                others.setdefault(name, torch.empty(declared.shape, dtype=dtype, device=device))
    return enliven(model, "planned", weights, placements, Leaves(trained, others), parts)


def _dtype(model: nn.Module, placement: Placement, leaf: Leaf) -> torch.dtype:
    """Return the type of a leaf that is not trained, which only its start knows: numbers, or places of numbers."""
    parameters = dict(model.named_parameters())
    module = model.get_submodule(placement.site.path)
    given = Given(placement.site, Values(module), {"fisher": parameters, "gradient": parameters})
    try:
        return leaf.init.fill(leaf.shape, torch.Generator(), given).dtype
    except Exception:  # a start that needs values or evidence is made of numbers, as far as is known
        return torch.float32
