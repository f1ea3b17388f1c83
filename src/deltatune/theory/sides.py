"""What instruments measure on: a model as it is or with a delta, batch after batch, without padding.

A batch is what the model is called with, by keyword. A side is None for the model as it is, weights to attach for the
time of the measurement, or another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import deltatune.backbones  # noqa: F401  (defines the anatomies)
from deltatune.core.attach import Attachment, attach
from deltatune.core.site import anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.tuning.encode import IGNORED
from deltatune.tuning.loop import put

Batch = Mapping[str, Any]
Loss = Callable[[Any], Tensor]
Side = Weights | nn.Module | None


def own_loss(output: Any) -> Tensor:
    """Return the loss [] that a model gives with its output; raises `DeltaTuneError` where there is none."""
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if loss is None:
        raise DeltaTuneError(
            "the model's output has no loss: put labels into the batches, or pass loss=function(output)."
        )
    return loss


def scores(output: Any) -> Tensor:
    """Return a model's output as scores [rows, length, classes]: the tensor that it is, or its logits."""
    found = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(found, Tensor):
        raise DeltaTuneError(
            f"the model's output is a {type(output).__name__} without logits; use a backbone with a head, "
            "as load_backbone gives."
        )
    return found


@contextmanager
def running(model: nn.Module, side: Side) -> Iterator[nn.Module]:
    """The scope in which what is yielded computes as `side` says; weights are attached to `model` in it."""
    if isinstance(side, Weights):
        with attach(model, side):
            yield model
    else:
        yield model if side is None else side


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The scope in which nothing in the model is random: all its modules are in evaluation mode, and theirs again after it."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], loss: Loss) -> float:
    """Return the mean of the batches' losses; raises `DeltaTuneError` when there are none."""
    values = [float(loss(model(**batch))) for batch in batches]
    check_some(values)
    return sum(values) / len(values)


def check_some(batches: Any) -> None:
    """Raise `DeltaTuneError` when there was no batch to measure on."""
    if not batches:
        raise DeltaTuneError("there are no batches to measure on; give a list of at least one, each as model(**batch).")


def trained(attached: Attachment) -> list[nn.Parameter]:
    """Return the leaves that an attachment trains; raises `DeltaTuneError` where there are none."""
    leaves = [leaf for leaf in attached.parameters() if leaf.requires_grad]
    if not leaves:
        raise DeltaTuneError(
            f"{attached.delta} trains nothing here (it is frozen, or of a method without leaves), so there is no gradient; "
            "attach for example LoRA(rank=8), and do not freeze it."
        )
    return leaves


def real(model: nn.Module, batch: Batch, shape: torch.Size, stack: str | None = None) -> Tensor:
    """Return which positions [rows, length] of a stack's states are no padding; without a stack, of the model's scores.

    A decoder behind an encoder reads its own mask, and its labels where the batch has no such mask.
    """
    stacks = {s.name: s for s in anatomy(model).stacks}
    behind = len(stacks) > 1 and (stack is None or stacks[stack].causal)
    given = batch.get("decoder_attention_mask" if behind else "attention_mask")
    if given is None and behind and "labels" in batch:
        given = batch["labels"] != IGNORED
    if given is None or given.shape != shape:
        return torch.ones(shape, dtype=torch.bool)
    return given.bool().cpu()


def answering(model: nn.Module, batch: Batch, shape: torch.Size) -> Tensor:
    """Return which positions [rows, length] of the scores answer: those that predict a label, without labels all but padding."""
    labels = batch.get("labels")
    if labels is None or labels.shape != shape:
        return real(model, batch, shape)
    wanted = (labels != IGNORED).cpu()
    stacks = anatomy(model).stacks
    if len(stacks) == 1 and stacks[0].causal:  # a causal model scores the next token
        wanted = torch.cat([wanted[:, 1:], torch.zeros_like(wanted[:, :1])], 1)
    return wanted


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The scope in which tensors may be moved in place; yields their values before it, which they have again after it."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield before
    finally:
        put(tensors, before)
