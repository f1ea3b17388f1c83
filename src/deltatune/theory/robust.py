"""Closed loop at test time: the controls of a delta, adjusted to each batch so that its states stay where they are known to answer well.

    M_j = {m_j + Q_j a}        m_j [d], Q_j [d, k]: mean and principal directions of h_j at the position that answers, over
                               training texts that are answered correctly
    C(u) = sum_j mean_rows |(I - Q_j Q_j^T) (h_j(d + u) - m_j)|^2 / v_j        v_j the variance of these texts' h_j
    u: the best of some steps of Adam on C from 0, for each batch anew

The robust prefix of Yang and Liu (2022, arXiv:2203.10378), whose d is a prefix; here of any trained delta. Theirs sums without
v_j, which lets the deepest block, whose states are longest, decide alone. No label of the batch is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltatune.core.attach import Attachment
from deltatune.core.site import anatomy
from deltatune.errors import DeltaTuneError
from deltatune.theory.sides import Batch, check_some, evaluating, restored, trained
from deltatune.theory.watch import watching
from deltatune.tuning.loop import put

SHARE = 0.9


@dataclass(frozen=True)
class Manifold:
    """The plane that holds the states of one block: `mean` [d], orthonormal `basis` [d, k], and the states' variance."""

    mean: Tensor
    basis: Tensor
    variance: float

    @classmethod
    def of(cls, mean: Tensor, moment: Tensor, share: float) -> Manifold:
        """Return the plane with a `share` of the variance of states of a mean [d] and a second moment [d, d]."""
        values, vectors = torch.linalg.eigh(moment - torch.outer(mean, mean))
        values = values.flip(0).clamp(min=0)
        variance = float(values.sum())
        if not variance:
            raise DeltaTuneError("the states of all texts are the same, which spans no plane; give more texts.")
        kept = int((values.cumsum(0) < share * variance * (1 - 1e-12)).sum()) + 1
        return cls(mean.float(), vectors.flip(1)[:, :kept].float(), variance)

    def apart(self, h: Tensor) -> Tensor:
        """Return the squared distance of states [rows, d] from the plane in units of the variance, [rows]."""
        h = h - self.mean
        return (h - h @ self.basis @ self.basis.mT).square().sum(-1) / self.variance


Manifolds = Mapping[str, Manifold]


@torch.no_grad()
def manifolds(model: nn.Module, batches: Iterable[Batch], share: float = SHARE) -> dict[str, Manifold]:
    """Return the planes that hold a `share` of the variance of each block's states, by the block's address.

    The model is as it answers, its delta attached; `batches` are of texts that it answers correctly, their last position the
    one that answers: prompts padded on the left, or a decoder's first token. Keeps one moment [d, d] a block. Raises
    `DeltaTuneError` without batches, and for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise DeltaTuneError(f"share={share} is none; write one above 0 and up to 1, e.g. {SHARE}.")
    count, first, second = 0, dict[str, Tensor](), dict[str, Tensor]()
    for batch in batches:
        states = {name: h.double() for name, h in last_states(model, batch).items()}
        count += next(iter(states.values())).shape[0]
        for name, h in states.items():
            first[name] = first.get(name, 0) + h.sum(0)
            second[name] = second.get(name, 0) + h.mT @ h
    check_some(count)
    return {name: Manifold.of(first[name] / count, second[name] / count, share) for name in first}


def last_states(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the states [rows, d] of the answering stack's blocks at the last position, by address, in their graph."""
    with evaluating(model), watching(model, _blocks(model)) as seen:
        model(**batch)
    return {name: h[:, -1] for name, (_, h) in seen.items()}


def _blocks(model: nn.Module) -> str:
    stacks = anatomy(model).stacks
    return ".".join(filter(None, [stacks[-1].name if len(stacks) > 1 else "", "block"]))


@contextmanager
def steered(
    attachment: Attachment, batch: Batch, known: Manifolds, steps: int = 10, rate: float = 1e-2
) -> Iterator[list[float]]:
    """The scope in which an attached delta is adjusted to one batch; its leaves are as they were when it ends.

    Yields C before each step and after the last; the leaves are where it was least. `batch` is as for `manifolds`. Raises
    `DeltaTuneError` when the delta has nothing that is trained.
    """
    leaves = trained(attachment)
    with restored(leaves):
        yield _adjust(attachment.model, leaves, batch, known, steps, rate)


@torch.enable_grad()
def _adjust(
    model: nn.Module, leaves: list[nn.Parameter], batch: Batch, known: Manifolds, steps: int, rate: float
) -> list[float]:
    optimizer, costs, best = torch.optim.Adam(leaves, lr=rate), [], [leaf.detach().clone() for leaf in leaves]
    for step in range(steps + 1):
        states = last_states(model, batch)
        cost = torch.stack([plane.apart(states[name]).mean() for name, plane in known.items()]).sum()
        costs.append(float(cost.detach()))
        if costs[-1] == min(costs):
            best = [leaf.detach().clone() for leaf in leaves]
        if step < steps:
            slopes = torch.autograd.grad(cost, leaves, allow_unused=True)
            for leaf, slope in zip(leaves, slopes, strict=True):
                leaf.grad = slope
            optimizer.step()
    optimizer.zero_grad()
    put(leaves, best)
    return costs
