"""How far two subspaces coincide: those that two deltas' changes span, site by site, and those of two sets of gradients.

    overlap = |U^T V|_F^2 / min(r_a, r_b) = mean cos^2 of the principal angles      U [n, r_a], V [n, r_b] orthonormal

1 when one holds the other, about max(r_a, r_b) / n for random ones (Björck and Golub, 1973; Gur-Ari et al., 2018).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import cos
from statistics import fmean

import torch
from torch import Tensor, nn

from deltatune.core.attach import Attachment
from deltatune.core.compare import compare
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.theory.finding import Finding
from deltatune.theory.sides import Batch, Loss, check_some, evaluating, own_loss, trained

NOISE = 1e-6  # gradients below this share of the largest direction are rounding


@dataclass(frozen=True)
class PrincipalAngles(Finding):
    """Principal angles in radians, ascending, between what two deltas' changes span: of outputs (columns) and inputs (rows).

    By module, or parameter; empty where one changes nothing, or both span so much that they meet anyway.
    """

    outputs: Mapping[str, tuple[float, ...]]
    inputs: Mapping[str, tuple[float, ...]]

    def overlaps(self) -> dict[str, tuple[float | None, float | None]]:
        """Return the overlap of outputs and of inputs, by module."""
        return {name: (_overlap(self.outputs[name]), _overlap(self.inputs[name])) for name in self.outputs}

    @property
    def finding(self) -> str:
        known = [_overlap(angles) for side in (self.outputs, self.inputs) for angles in side.values() if angles]
        some = [overlap for overlap in known if overlap is not None]
        if not some:
            return "At no module do the two deltas span subspaces that could have angles."
        return (
            f"Over {sum(map(bool, self.outputs.values()))} modules the subspaces overlap by {100 * fmean(some):.1f} % "
            f"on average, {100 * max(some):.1f} % at most."
        )


@dataclass(frozen=True)
class GradientOverlap(Finding):
    """The overlap of the spans of two sets of batches' gradients, their ranks, and what random spans of those ranks have."""

    overlap: float
    ranks: tuple[int, int]
    size: int

    @property
    def random(self) -> float:
        """The overlap to expect of random subspaces, max(r_a, r_b) / n."""
        return max(self.ranks) / self.size

    @property
    def finding(self) -> str:
        return (
            f"The gradients' spans of {self.ranks[0]} and {self.ranks[1]} dimensions overlap by {100 * self.overlap:.1f} %; "
            f"random ones would by {100 * self.random:.2g} %."
        )


def principal_angles(a: Weights, b: Weights, model: nn.Module | None = None) -> PrincipalAngles:
    """Return the principal angles between what two deltas' changes span; `model` is needed unless both are LoRAs.

    Raises `DeltaTuneError` for deltas that are no changes of weights.
    """
    found = compare(a, b, model)
    if found.by == "leaves":
        raise DeltaTuneError(
            f"{a.delta} is no change of matrices that span anything, or the backbone is not given: pass model=..., with a "
            "mergeable delta such as LoRA; `theory.function_gap.compare_answers` compares any two."
        )
    return PrincipalAngles(
        {name: d.outputs for name, d in found.modules.items()}, {name: d.inputs for name, d in found.modules.items()}
    )


def subspace_overlap(U: Tensor, V: Tensor) -> float:
    """Return |U^T V|_F^2 / min(r_a, r_b) of orthonormal columns [n, r_a] and [n, r_b]; 0 when one is empty."""
    least = min(U.shape[1], V.shape[1])
    return float((U.mT @ V).square().sum()) / least if least else 0.0


def gradient_overlap(
    attached: Attachment, a: Iterable[Batch], b: Iterable[Batch], loss: Loss = own_loss
) -> GradientOverlap:
    """Return how far the spans of the gradients on batches of two tasks coincide, in the leaves of an attached delta.

    Holds one gradient of the leaves a batch. Raises `DeltaTuneError` without batches or trained leaves.
    """
    with evaluating(attached.model):
        spans = [_span(_gradients(attached, batches, loss)) for batches in (a, b)]
    return GradientOverlap(subspace_overlap(*spans), (spans[0].shape[1], spans[1].shape[1]), spans[0].shape[0])


def _gradients(attached: Attachment, batches: Iterable[Batch], loss: Loss) -> Tensor:
    """Return one gradient a batch, [n, batches] in float64."""
    leaves, found = trained(attached), []
    for batch in batches:
        grads = torch.autograd.grad(loss(attached.model(**batch)), leaves, materialize_grads=True)
        found.append(torch.cat([g.double().flatten().cpu() for g in grads]))
    check_some(found)
    return torch.stack(found, 1)


def _span(G: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of columns [n, k]."""
    U, S, _ = torch.linalg.svd(G, full_matrices=False)
    return U[:, S / S[0].clamp(min=torch.finfo(S.dtype).tiny) > NOISE]


def _overlap(angles: tuple[float, ...]) -> float | None:
    return fmean(cos(angle) ** 2 for angle in angles) if angles else None
