"""Leaving reparameterizations behind: what their maps compute, as plain leaves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltatune.core.delta import Delta, Placement, Term, place
from deltatune.core.fit import check_tensors
from deltatune.core.method import Bag
from deltatune.core.weights import Weights, completed


def flatten(model: nn.Module, weights: Weights) -> Weights:
    """Return the same delta without its reparameterizations: what their maps compute, as plain leaves (Li and Liang, 2021)."""
    placements = place(model, weights.delta)
    check_tensors(weights, placements)
    held = completed(model, weights, placements)
    delta = Delta(tuple(Term(term.where, term.method.computes) for term in weights.delta.terms))
    tensors: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    for before, after in zip(placements, place(model, delta), strict=True):
        plain = _unfolded(before, held)
        for leaf, declared in after.leaves.items():
            if declared.kind != "seeded" or after.name(leaf) in weights.fixed:
                (tensors if declared.trained else fixed)[after.name(leaf)] = plain[leaf].contiguous()
    return Weights(delta, tensors, weights.backbone, weights.seed, weights.notes, fixed)


@torch.no_grad()
def _unfolded(placement: Placement, held: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {leaf: held[placement.name(leaf)] for leaf in placement.leaves}
    if placement.method.computes is placement.method:
        return own
    return vars(placement.method.unfold(Bag(own)))
