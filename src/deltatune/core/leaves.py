"""The leaves of a delta on a live model: the module that holds its tensors, and what reads them from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.delta import Placement
from deltatune.core.method import Bag, Method
from deltatune.core.stored import device, share_gradients
from deltatune.core.walk import submodule
from deltatune.core.weights import Weights, completed
from deltatune.errors import DeltaTuneError


class Leaves(nn.Module):
    """One delta's tensors on a live backbone, by `key`: parameters are trained, buffers are not, and no state dict has them."""

    def __init__(self, trained: dict[str, nn.Parameter], others: dict[str, Tensor]) -> None:
        super().__init__()
        self._parameters.update(trained)
        self._buffers.update(others)
        self._non_persistent_buffers_set.update(others)
        self.cast: dict[torch.dtype, dict[str, Tensor]] = {}


class Tensors:
    """A method's tensors at one site, read from the module that holds the delta's leaves at the time of use."""

    def __init__(self, method: Method, holder: Leaves, keys: dict[str, str]) -> None:
        self.method, self.holder, self.keys = method, holder, keys
        self.on_meta = any(t.is_meta for t in self.live().values())

    def __call__(self, dtype: torch.dtype) -> Any:
        """Return the leaves as attributes, cast once to the compute dtype; indices stay whole numbers."""
        held = self.live()
        if not self.on_meta and any(t.is_meta for t in held.values()):
            raise DeltaTuneError(
                f"the leaves of {self.method} were taken to the meta device after they were attached, as offloading does; "
                "offload the backbone first, then attach."
            )
        if cast := self.holder.cast.get(dtype):
            held = {leaf: cast.get(key, held[leaf]) for leaf, key in self.keys.items()}
        return self.method.unfold(Bag({leaf: t.to(dtype) if t.is_floating_point() else t for leaf, t in held.items()}))

    def live(self) -> dict[str, Tensor]:
        """Return the leaves themselves, by name."""
        trained, fixed = self.holder._parameters, self.holder._buffers
        return {leaf: trained[key] if key in trained else fixed[key] for leaf, key in self.keys.items()}  # type: ignore[misc]


def key(name: str) -> str:
    """Return the name under which the module system, which allows no dots, holds the tensor `name`."""
    return name.replace(".", "/")


def hold(model: nn.Module, weights: Weights, placements: list[Placement], learn: bool = True) -> Leaves:
    """Return a module that holds the weights' tensors, each on the device of its site: copies, if they are to `learn`."""
    held = completed(model, weights, placements)
    trained: dict[str, nn.Parameter] = {}
    others: dict[str, Tensor] = {}
    for placement in placements:
        here = device(submodule(model, placement.site.path))
        for leaf, declared in placement.leaves.items():
            name = placement.name(leaf)
            own = key(name)
            if own in trained or own in others:
                continue
            tensor = held[name].detach().to(here, copy=learn)
            if declared.trained and learn:
                trained[own] = nn.Parameter(tensor)
            else:
                others[own] = tensor
    leaves = Leaves(trained, others)
    share_gradients(leaves, model)
    return leaves


def tensors_of(placement: Placement, leaves: Leaves) -> Tensors:
    """Return what reads the tensors of a placement from the module that holds them."""
    return Tensors(placement.method, leaves, {leaf: key(placement.name(leaf)) for leaf in placement.leaves})
