"""Ways to train a model: what one step takes and what it keeps for its backward pass.

A step is the forward and backward pass of the language modelling loss, without an optimizer. Nothing here needs more than
torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from benchmarks.measure import Clock

STEP = "step"


@dataclass(frozen=True)
class Contestant:
    """One way to train: its loss for a batch, the tensors that get gradients, and all tensors that are not activations.

    A step is taken in the scope `within`.
    """

    loss: Callable[[], Tensor]
    trained: list[nn.Parameter]
    model: nn.Module
    delta: str | None = None
    within: Callable[[], AbstractContextManager[None]] = nullcontext

    def turn(self, clock: Clock) -> None:
        """Take one step and drop its gradients."""
        with self.within(), clock(STEP):
            self.loss().backward()
        self._forget()

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.trained)

    def saved_bytes(self) -> int:
        """Count what a forward pass has kept for its backward pass at its end: each storage once, and no parameter."""
        kept: WeakSet[_Kept] = WeakSet()

        def pack(tensor: Tensor) -> _Kept:
            one = _Kept(tensor)
            kept.add(one)
            return one

        with self.within(), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
            loss = self.loss()
        sizes = {_storage(one.tensor): one.tensor.untyped_storage().nbytes() for one in kept}
        known = {_storage(t) for t in self.model.parameters()}
        loss.backward()
        self._forget()
        return sum(size for storage, size in sizes.items() if storage not in known)

    def peak_bytes(self, device: str) -> int | None:
        """Return what one step allocates on the GPU at most, beyond what is there before it; None on a CPU."""
        if device == "cpu":
            return None
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with self.within():
            self.loss().backward()
        torch.cuda.synchronize(device)
        self._forget()
        return torch.cuda.max_memory_allocated(device) - before

    def _forget(self) -> None:
        for parameter in self.trained:
            parameter.grad = None


class _Kept:
    """A tensor that the graph holds, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _storage(tensor: Tensor) -> int:
    """Name the memory that a tensor lies in."""
    return tensor.untyped_storage().data_ptr()


def training(model: Any, ids: Tensor, trained: Iterable[nn.Parameter], delta: str | None = None) -> Contestant:
    """Train `trained` inside `model`."""
    return Contestant(lambda: model(input_ids=ids, labels=ids).loss, list(trained), model, delta)


def limit(model: Any, ids: Tensor) -> Contestant:
    """Train nothing: the gradient flows to the output of the embeddings and stops there."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids)

    def loss() -> Tensor:
        return model(inputs_embeds=embedded.detach().requires_grad_(), labels=ids).loss

    return Contestant(loss, [], model)
