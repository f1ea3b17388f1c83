"""The function-space gap: how differently two models answer, whatever their parameters (Ding et al., 2022, section 4.1).

    KL = E_x sum_c p_a(c | x) (ln p_a(c | x) - ln p_b(c | x))  [nats]        MSE = E_x mean_c (s_a(c | x) - s_b(c | x))^2

over the positions that answer: those that predict a label, without labels all but padding. s are scores, p = softmax(s);
a is the reference (fine-tuning), b the one that is to come near it (delta tuning).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from deltatune.errors import DeltaTuneError
from deltatune.theory.finding import Finding
from deltatune.theory.sides import Batch, Side, answering, check_some, evaluating, running, scores


@dataclass(frozen=True)
class FunctionGap(Finding):
    """KL in nats with its standard error over positions, MSE of scores, share of equal first choices, and how many positions."""

    kl: float
    kl_error: float
    mse: float
    agreement: float
    positions: int

    @property
    def finding(self) -> str:
        return (
            f"Over {self.positions:,} positions KL(a || b) is {self.kl:.4g} +- {self.kl_error:.2g} nats and the mean squared "
            f"difference of scores {self.mse:.4g}; the first choices agree in {100 * self.agreement:.1f} %."
        )


def gaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return KL(a || b) in nats, the mean squared difference and whether the largest agree, each [n], of scores [n, classes]."""
    log_p, log_q = (s.double().log_softmax(-1) for s in (a, b))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl, (a.double() - b.double()).square().mean(-1), (a.argmax(-1) == b.argmax(-1)).double()


@torch.no_grad()
def compare_answers(model: nn.Module, a: Side, b: Side, batches: Iterable[Batch]) -> FunctionGap:
    """Return how far the answers of two sides are apart on the batches: weights for `model`, None for it as it is, or models.

    Keeps one batch of scores. Raises `DeltaTuneError` when there is no position to compare, and for scores of other shapes.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for batch in batches:
        found = []
        for side in (a, b):
            with running(model, side) as live, evaluating(live):
                found.append(scores(live(**batch)))
        first, second = found
        if first.shape != second.shape:
            raise DeltaTuneError(
                f"the scores have the shapes {tuple(first.shape)} and {tuple(second.shape)}; only models with one vocabulary "
                "can be compared by their scores, `theory.similarity.compare_states` compares hidden states of any widths."
            )
        kept = answering(model, batch, first.shape[:-1]).to(first.device)
        kl, mse, same = gaps(first[kept], second[kept])
        sums += torch.stack([kl.sum(), kl.square().sum(), mse.sum(), same.sum()]).cpu()
        count += kl.numel()
    check_some(count)
    mean, square, mse, same = (sums / count).tolist()
    error = sqrt(max(square - mean * mean, 0.0) / count)
    return FunctionGap(mean, error, mse, same, count)
