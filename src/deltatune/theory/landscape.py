"""The loss around a delta: along the line between two weights, and on a plane through them.

    line: F((1 - t) w_a + t w_b), t in [0, 1]      barrier = max_t F(t) - ((1 - t) F(0) + t F(1))   (Frankle et al., 2020)
    plane: F(w + x d_1 + y d_2)                    each row of d scaled to the norm of that row of w  (Li et al., 2018)

A row is one output of a leaf with two or more dimensions; a leaf with one is scaled as a whole. A row of zeros, such as those of a
fresh B of LoRA, does not move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from deltatune.core.attach import Attachment, attach
from deltatune.core.convert import changes, written
from deltatune.core.delta import place
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.theory.finding import Finding
from deltatune.theory.sides import Batch, Loss, check_some, evaluating, mean_loss, own_loss, restored
from deltatune.theory.spectrum import check_mergeable

Line = Mapping[str, tuple[Tensor, Tensor]]  # a trained leaf's name -> its value at both ends
Direction = Mapping[str, Tensor]


@dataclass(frozen=True)
class Interpolation(Finding):
    """The loss at each t of the line between two weights."""

    at: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """How far the loss rises above the straight line between its ends; 0 where it does not."""
        first, last = self.losses[0], self.losses[-1]
        return max(f - ((1 - t) * first + t * last) for t, f in zip(self.at, self.losses, strict=True))

    @property
    def finding(self) -> str:
        ends = f"from {self.losses[0]:.4g} to {self.losses[-1]:.4g}"
        return f"Between the two weights the loss goes {ends} over a barrier of {self.barrier:.3g}."


@dataclass(frozen=True)
class Plane(Finding):
    """The loss [len(at), len(at)] on the plane, losses[i][j] at x = at[i], y = at[j], in units of the row norms."""

    at: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    centre: float

    @property
    def finding(self) -> str:
        flat = [loss for row in self.losses for loss in row]
        return (
            f"Within {max(self.at):g} row norms the loss goes from {min(flat):.4g} to {max(flat):.4g}; "
            f"at the weights it is {self.centre:.4g}."
        )


def line(model: nn.Module, a: Weights, b: Weights) -> Line:
    """Return the ends of each trained leaf between two weights of one delta.

    Raises `DeltaTuneError` unless all that is not trained is the same at both ends.
    """
    if a.delta != b.delta:
        raise DeltaTuneError(
            f"{a.delta} and {b.delta} are unlike, so there is no line between them; write both as values: to_full(model, weights)."
        )
    seeded = any(leaf.kind == "seeded" for p in place(model, a.delta) for leaf in p.leaves.values())
    alike = a.fixed.keys() == b.fixed.keys() and all(torch.equal(t, b.fixed[name]) for name, t in a.fixed.items())
    if not alike or (seeded and a.seed != b.seed):
        raise DeltaTuneError(
            f"the two weights of {a.delta} have other fixed tensors (seeds {a.seed} and {b.seed}), so a point between their "
            "trained ones means nothing; train both from one seed, or write both as values: to_full(model, weights)."
        )
    return {name: (tensor, b.tensors[name]) for name, tensor in a.tensors.items()}


def as_values(model: nn.Module, a: Weights | None, b: Weights, tolerance: float = 0.05) -> tuple[Weights, Weights]:
    """Return two unlike weights, or the backbone as it is (None) and one, as values of the parameters that either changes.

    `tolerance` is the share of its change that a parameter may lose to float32. Raises `DeltaTuneError` for a delta that
    is no change of weights.
    """
    for weights in filter(None, (a, b)):
        check_mergeable(weights)
    found = [changes(model, weights) if weights else {} for weights in (a, b)]
    zero = {name: torch.zeros_like(change) for each in found for name, change in each.items()}
    first, second = (written(model, {**zero, **each}, [b], None, tolerance)[0] for each in found)
    return first, second


@torch.no_grad()
def move(attached: Attachment, between: Line, t: float) -> None:
    """Put the trained leaves at (1 - t) a + t b."""
    for name, parameter in attached.named_parameters():
        first, last = between[name]
        parameter.copy_(last if t == 1 else torch.lerp(first, last, t))


def interpolate(
    model: nn.Module, a: Weights, b: Weights, batches: Sequence[Batch], points: int = 11, loss: Loss = own_loss
) -> Interpolation:
    """Return the mean of the batches' losses at `points` even points of the line between two weights of one delta."""
    check_some(batches)
    if points < 2:
        raise DeltaTuneError(f"{points} points are no line; write at least 2, its ends.")
    at, losses, between = tuple(i / (points - 1) for i in range(points)), [], line(model, a, b)
    with evaluating(model), attach(model, a) as attached:
        for t in at:
            move(attached, between, t)
            losses.append(mean_loss(model, batches, loss))
    return Interpolation(at, tuple(losses))


def filter_normalised(direction: Tensor, like: Tensor) -> Tensor:
    """Return a direction whose rows [d_out, ...] have the norms of those of `like` (Li et al., 2018, arXiv:1712.09913)."""
    if like.dim() < 2:
        return direction * (like.norm() / direction.norm().clamp(min=torch.finfo(direction.dtype).tiny))
    norms = [t.flatten(1).norm(dim=1) for t in (like, direction)]
    scale = norms[0] / norms[1].clamp(min=torch.finfo(direction.dtype).tiny)
    return direction * scale.view(-1, *[1] * (like.dim() - 1))


def random_direction(attached: Attachment, generator: Generator) -> Direction:
    """Return a random direction of the trained leaves, filter-normalised."""
    return {
        name: filter_normalised(torch.randn(p.shape, generator=generator), p.detach().float().cpu())
        for name, p in attached.named_parameters()
    }


def plane(
    attached: Attachment,
    batches: Sequence[Batch],
    radius: float = 1.0,
    points: int = 11,
    directions: tuple[Direction, Direction] | None = None,
    loss: Loss = own_loss,
    seed: int = 0,
) -> Plane:
    """Return the mean of the batches' losses on points x points of a plane through an attached delta's leaves.

    `directions` are two tensors for each leaf by its name in the weights; without them they are random. The leaves are
    as they were at the end.
    """
    check_some(batches)
    if points < 2 or radius <= 0:
        raise DeltaTuneError(
            f"radius={radius}, points={points} is no plane; write a radius above 0 and 2 points or more."
        )
    generator = Generator().manual_seed(seed)
    first, second = directions or (random_direction(attached, generator), random_direction(attached, generator))
    at = tuple(radius * (2 * i / (points - 1) - 1) for i in range(points))
    with evaluating(attached.model), kept(attached) as start:
        centre = mean_loss(attached.model, batches, loss)
        rows = []
        for x in at:
            row = []
            for y in at:
                _put(attached, start, first, second, x, y)
                row.append(mean_loss(attached.model, batches, loss))
            rows.append(tuple(row))
    return Plane(at, tuple(rows), centre)


@contextmanager
def kept(attached: Attachment) -> Iterator[dict[str, Tensor]]:
    """The scope after which the trained leaves are as before, bit for bit; yields their values."""
    named = dict(attached.named_parameters())
    with restored(list(named.values())) as start:
        yield dict(zip(named, start, strict=True))


@torch.no_grad()
def _put(
    attached: Attachment, start: Mapping[str, Tensor], first: Direction, second: Direction, x: float, y: float
) -> None:
    for name, parameter in attached.named_parameters():
        parameter.copy_(start[name] + x * first[name].to(parameter) + y * second[name].to(parameter))
