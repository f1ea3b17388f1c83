"""Sharpness: the largest eigenvalues of the loss's Hessian with respect to a delta's leaves.

    H v = d/ds grad F(delta + s v) at s = 0        by differentiating the gradient once more, batch by batch
    F: the mean of the batches' losses            H [d', d'] is never formed; Lanczos asks for H v only

Attention is computed by plain products while this runs: its fused kernels have no second derivative, and torch's own
fallback has. Sources: Pearlmutter, 1994 (Hessian-vector products); Ghorbani et al., 2019, arXiv:1901.10159 (Lanczos).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltatune.core.attach import Attachment
from deltatune.errors import DeltaTuneError
from deltatune.theory.finding import Finding
from deltatune.theory.krylov import lanczos
from deltatune.theory.sides import Batch, Loss, check_some, evaluating, own_loss, trained

STEPS = 20  # Lanczos steps beyond the number of eigenvalues asked for
KEPT = 2**28  # bytes of Lanczos vectors that are kept without being asked for


@dataclass(frozen=True)
class Sharpness(Finding):
    """The k largest eigenvalues, descending, their residuals |H v - value v|, and the least eigenvalue that Lanczos saw.

    `gradient` is |grad F|, and `held` the share of its square in the k eigenvectors' span (Gur-Ari et al., 2018).
    """

    delta: str
    values: tuple[float, ...]
    residuals: tuple[float, ...]
    least: float
    gradient: float
    held: float
    size: int

    @property
    def finding(self) -> str:
        low = f"the least that was seen is {self.least:.3g}" if self.least < 0 else "none below 0 was seen"
        return (
            f"The largest Hessian eigenvalue over {self.size:,} parameters is {self.values[0]:.4g} "
            f"(residual {self.residuals[0]:.1g}), {low}; the {len(self.values)} largest directions hold "
            f"{100 * self.held:.1f} % of the gradient."
        )


class Hessian:
    """F's Hessian in an attached delta's leaves, as a product with vectors [d'] in float64, in the order of `trained`."""

    def __init__(self, attached: Attachment, batches: Sequence[Batch], loss: Loss = own_loss) -> None:
        self.model, self.leaves = attached.model, trained(attached)
        self.batches, self.loss = batches, loss
        check_some(batches)

    @property
    def size(self) -> int:
        """The number of trained parameters d'."""
        return sum(leaf.numel() for leaf in self.leaves)

    def gradient(self) -> Tensor:
        """Return grad F [d']."""
        return self._sum(lambda grads: grads, create_graph=False)

    def __call__(self, v: Tensor) -> Tensor:
        """Return H v [d'] for v [d']."""
        pieces = [
            p.view_as(x).to(x) for p, x in zip(v.split([x.numel() for x in self.leaves]), self.leaves, strict=True)
        ]

        def again(grads: Sequence[Tensor]) -> Sequence[Tensor]:
            pairs = [(g * p).sum() for g, p in zip(grads, pieces, strict=True) if g.requires_grad]
            if not pairs:  # F is linear in the leaves
                return [torch.zeros_like(leaf) for leaf in self.leaves]
            return torch.autograd.grad(torch.stack(pairs).sum(), self.leaves, materialize_grads=True)

        return self._sum(again, create_graph=True)

    def _sum(self, then: Callable[[Sequence[Tensor]], Sequence[Tensor]], create_graph: bool) -> Tensor:
        total = torch.zeros(self.size, dtype=torch.float64)
        with evaluating(self.model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for batch in self.batches:
                value = self.loss(self.model(**batch))
                grads = torch.autograd.grad(value, self.leaves, create_graph=create_graph, materialize_grads=True)
                total += torch.cat([g.detach().double().flatten().cpu() for g in then(grads)])
        return total / len(self.batches)


def sharpness(
    attached: Attachment,
    batches: Sequence[Batch],
    k: int = 5,
    steps: int | None = None,
    loss: Loss = own_loss,
    seed: int = 0,
) -> Sharpness:
    """Return the k algebraically largest eigenvalues of the Hessian of the mean loss in an attached delta's leaves.

    Each of the `steps` (k + 20) passes over the batches twice as deep as a training step, and keeps one float64 vector
    of the leaves. Raises `DeltaTuneError` for a delta with nothing to train, for no batches, and where the vectors would take
    more than 256 MiB, unless `steps` says so.
    """
    product = Hessian(attached, batches, loss)
    if k < 1 or (steps is not None and steps < k):
        raise DeltaTuneError(
            f"k={k} eigenvalues of {steps} steps cannot be found; write k of 1 or more, and steps above k."
        )
    k = min(k, product.size)
    kept = 8 * product.size * (k + STEPS)
    if steps is None and kept > KEPT:
        raise DeltaTuneError(
            f"{k + STEPS} Lanczos vectors of {product.size:,} parameters take {kept / 1e9:.2g} GB; write steps=... for fewer, or ask "
            "of a smaller delta, such as LoRA(rank=8) or BitFit()."
        )
    pairs = lanczos(product, product.size, steps or k + STEPS, seed)
    g = product.gradient()
    norm = float(g.norm())
    held = float((pairs.vectors[:, :k].mT @ g).norm()) ** 2 / norm**2 if norm else 0.0
    values, residuals = (tuple(t[:k].tolist()) for t in (pairs.values, pairs.residuals))
    return Sharpness(str(attached.delta), values, residuals, float(pairs.values[-1]), norm, held, product.size)
