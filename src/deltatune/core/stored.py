"""Stored values: what a parameter of the backbone is worth where it is quantised, or sharded over processes.

A parameter of an ordinary type is its own values. Any other type has a `Storage`, found by the name of the type or of
one of its bases, so that the libraries they belong to need not be there; `deltatune.backbones` adds the quantised ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.walk import modules
from deltatune.errors import DeltaTuneError

ORDINARY: set[type[Tensor]] = {Tensor, nn.Parameter}


@dataclass(frozen=True)
class Storage:
    """How one type of tensor holds its values.

    `values` gives them, with the help of the module they belong to, as an ordinary tensor of the shape that the module
    computes with; `shape` is that shape, and `codes` an ordinary tensor that tells two parameters apart at less cost.
    `store` holds new values as another tensor does, or says with None that it cannot. `lossy` storage rounds what it
    stores: the parameter is quantised. `settings` are attributes that its module needs, for gradients to pass it.
    """

    values: Callable[[Any, Any], Tensor]
    codes: Callable[[Any], Tensor]
    store: Callable[[Tensor, Any], Tensor | None]
    shape: Callable[[Any], tuple[int, ...]] = lambda tensor: tuple(tensor.shape)
    lossy: bool = True
    settings: tuple[tuple[str, Any], ...] = ()


STORAGES: dict[str, Storage] = {}  # by module.name of a type of tensors
# each tells where a module computes whose parameters are elsewhere between calls, or None; `deltatune.backbones` adds one
OFFLOADERS: list[Callable[[nn.Module], torch.device | None]] = []


def storage(tensor: Tensor) -> Storage | None:
    """Return how a tensor holds its values, or None when it is an ordinary one."""
    if type(tensor) in ORDINARY:
        return None
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(tensor).__mro__)
    return next((STORAGES[name] for name in names if name in STORAGES), None)


def values(tensor: Tensor, module: nn.Module) -> Tensor:
    """Return what a module's parameter is worth as an ordinary tensor: itself, gathered from all processes, or dequantised.

    Raises `DeltaTuneError` on the meta device, where there are no values.
    """
    if tensor.is_meta:
        raise DeltaTuneError(
            f"a {type(module).__name__} is on the meta device and has no values; load the backbone's weights, and do not offload "
            "what a method looks at."
        )
    found = storage(tensor)
    return tensor if found is None else values(found.values(tensor, module), module)


def shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape that a module computes with, however the parameter is packed."""
    found = storage(tensor)
    return tuple(tensor.shape) if found is None else found.shape(tensor)


def codes(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor that tells parameters apart: the values, or the whole numbers that stand for them."""
    found = storage(tensor)
    return tensor if found is None else codes(found.codes(tensor))


def quantised(tensor: Tensor) -> bool:
    """Whether a parameter holds rounded values."""
    found = storage(tensor)
    return found is not None and found.lossy


def sharded(tensor: Tensor) -> bool:
    """Whether a parameter is split over processes."""
    return storage(tensor) is SHARDED


def stored(new: Tensor, like: Tensor) -> Tensor:
    """Return new values held as `like` holds its own; raises `DeltaTuneError` where that cannot be done."""
    found = storage(like)
    held = new.to(like.device, like.dtype).contiguous() if found is None else found.store(new, like)
    if held is None:
        raise DeltaTuneError(
            f"new values cannot be written into a parameter that is quantised as {type(like).__name__}. Keep the delta "
            "attached, or merge it into the backbone before quantising (check=False)."
        )
    return held


def settings(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Return what modules need for their kind of storage while a delta is attached: (module, attribute, value)."""
    found = ((m, storage(p)) for m in modules(model).values() for p in m._parameters.values() if p is not None)
    return [(module, *setting) for module, kind in found if kind is not None for setting in kind.settings]


class Values(Mapping[str, Tensor]):
    """The values of a module's own parameters by name, computed when they are looked at."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = {name: p for name, p in module._parameters.items() if p is not None}

    def __getitem__(self, name: str) -> Tensor:
        return values(self.parameters[name], self.module)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def device(module: nn.Module) -> torch.device:
    """Return where a module computes: where its first parameter is, or comes to for a call, or where its shards are."""
    own = next((p for p in module._parameters.values() if p is not None), None)
    first: Any = next(module.parameters()) if own is None else own
    if first.is_meta:
        found = (offloader(inner) for inner in module.modules() for offloader in OFFLOADERS)
        return next((there for there in found if there is not None), first.device)
    return torch.device(first.device_mesh.device_type) if sharded(first) else first.device


def share_gradients(leaves: nn.Module, model: nn.Module) -> None:
    """Give every process the mean gradient of leaves that join a model after it was sharded; the sharding knows nothing of them."""
    found: list[Any] = [p for p in model.parameters() if sharded(p)]
    for leaf in leaves.parameters() if found else ():
        leaf.register_post_accumulate_grad_hook(lambda leaf: _average(leaf, found[0].device_mesh))


def settle(model: nn.Module) -> None:
    """Let FSDP2 put away what it has gathered for a forward, where new values would be lost at the next gathering."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _average(leaf: Tensor, mesh: Any) -> None:
    for dimension in range(mesh.ndim):
        torch.distributed.all_reduce(leaf.grad, torch.distributed.ReduceOp.SUM, mesh.get_group(dimension))
    leaf.grad /= mesh.size()


def _distribute(new: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    local = new.to(like.device, like.dtype).contiguous()
    return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)


SHARDED = Storage(
    values=lambda tensor, module: tensor.full_tensor(),
    codes=lambda tensor: tensor.full_tensor(),
    store=_distribute,
    lossy=False,
)
STORAGES["torch.distributed.tensor.DTensor"] = SHARDED
