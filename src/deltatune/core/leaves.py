"""The leaves of a delta on a live model: the module that holds its tensors, and what reads them from it."""

from __future__ import annotations

from torch import Tensor, nn

from deltatune.core.delta import Placement
from deltatune.core.ports import Tensors
from deltatune.core.stored import device, share_gradients
from deltatune.core.walk import submodule
from deltatune.core.weights import Weights, completed


class Leaves(nn.Module):
    """One delta's tensors on a live backbone, by `key`: parameters are trained, buffers are not, and no state dict has them."""

    def __init__(self, trained: dict[str, nn.Parameter], others: dict[str, Tensor]) -> None:
        super().__init__()
        self._parameters.update(trained)
        self._buffers.update(others)
        self._non_persistent_buffers_set.update(others)


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


def tensors_of(placement: Placement, leaves: nn.Module) -> Tensors:
    """Return what reads the tensors of a placement from the module that holds them."""
    return Tensors(placement.method, leaves, {leaf: key(placement.name(leaf)) for leaf in placement.leaves})
