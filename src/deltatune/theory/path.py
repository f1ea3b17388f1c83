"""The path of training through the space of a delta's leaves, and the plane that holds most of it.

    M [s, n]: w_i - w_last, less their mean        M = U S V^T      coordinates U S [s, k], shares S_k^2 / sum S^2

Only the Gram matrix M M^T [s, s] is decomposed, so n may be large (Li et al., 2018, section 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.theory.finding import Finding


@dataclass(frozen=True)
class Trajectory(Finding):
    """Where the saved weights lie in their principal components: coordinates [s, k], the components' shares of variance."""

    coordinates: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]

    @property
    def finding(self) -> str:
        held = 100 * sum(self.shares[:2])
        return f"Two directions hold {held:.1f} % of the variance of a path of {len(self.coordinates)} weights."


def principal_components(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return coordinates [s, k] and shares of variance [k] of points [s, n], about their mean, in float64."""
    M = points.double() - points.double().mean(0)
    values, U = torch.linalg.eigh(M @ M.mT)
    values = values.flip(0).clamp(min=0)[:k]
    total = M.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return U.flip(1)[:, :k] * values.sqrt(), values / total


def trajectory(saved: Sequence[Weights], components: int = 2) -> Trajectory:
    """Return the path of weights of one delta, in the order given, in its first principal components.

    Raises `DeltaTuneError` for fewer than 3 weights, and for weights of several deltas.
    """
    deltas = {str(weights.delta) for weights in saved}
    if len(saved) < 3 or len(deltas) != 1:
        raise DeltaTuneError(
            f"a path needs 3 or more weights of one delta; found {len(saved)} of {', '.join(sorted(deltas)) or 'none'}. "
            "Save them while training, by on_step or at each checkpoint."
        )
    points = torch.stack([torch.cat([t.flatten() for _, t in sorted(w.tensors.items())]) for w in saved])
    coordinates, shares = principal_components(points, components)
    return Trajectory(tuple(map(tuple, coordinates.tolist())), tuple(shares.tolist()))
