"""Seats: what a delta is for the writers of files, a method at one site of a live model with all its leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.delta import place
from deltatune.core.fit import check_backbone, check_tensors
from deltatune.core.method import Bag
from deltatune.core.site import Site
from deltatune.core.weights import Weights, completed, fingerprint
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors


@dataclass(frozen=True, eq=False)
class Seat:
    """A method at one site of a live model, its tensors there (regenerated ones included), and the site's own tensors."""

    method: Any
    site: Site
    leaves: Tensors
    own: Mapping[str, Tensor]
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the site's weight as it is stored."""
        return tuple(self.own["weight"].shape) if "weight" in self.own else ()

    @property
    def W(self) -> Tensor:
        """The site's weight, float32 [d_out, d_in]."""
        return weight_of(self.site, self.own)

    @property
    def unfolded(self) -> Tensors:
        """The tensors that the method computes with."""
        return vars(self.method.unfold(Bag(self.leaves)))


def weight_of(site: Site, own: Mapping[str, Tensor]) -> Tensor:
    """Return the weight among a site's own tensors, float32 [d_out, d_in]."""
    return site.matrix(own["weight"].detach().to("cpu", torch.float32))


def seats_of(model: nn.Module, weights: Weights) -> list[Seat]:
    """Return the seats of weights in the order of the model; raises `DeltaTuneError` when they are not for it, or act nowhere."""
    check_backbone(weights.backbone, fingerprint(model), check=True)
    placements = place(model, weights.delta)
    check_tensors(weights, placements)
    if not placements:
        raise DeltaTuneError(f"{weights.delta} acts nowhere, and other libraries have no file of nothing.")
    held = completed(model, weights, placements)
    order = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    seats = []
    for placement in sorted(placements, key=lambda p: order[p.site.path]):
        leaves = {leaf: _plain(held[placement.name(leaf)]) for leaf in placement.leaves}
        own = dict(model.get_submodule(placement.site.path).named_parameters(recurse=False))
        seats.append(Seat(placement.method, placement.site, leaves, own, weights.seed))
    return seats


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu")
    return tensor.float() if tensor.is_floating_point() else tensor
