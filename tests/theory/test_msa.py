"""A linear-quadratic problem, whose optimal controls the Riccati equation gives."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.theory.dynamics import System
from deltatune.theory.msa import MSA

HORIZON = 6


def problem() -> tuple[System, list[torch.Tensor]]:
    """Return a linear system with quadratic costs, started without control, and its optimal controls by the Riccati recursion."""
    g = torch.Generator().manual_seed(0)
    A = torch.eye(3, dtype=torch.float64) + 0.1 * torch.randn(3, 3, generator=g, dtype=torch.float64)
    B = torch.randn(3, 2, generator=g, dtype=torch.float64)
    Q, R, F = (scale * torch.eye(n, dtype=torch.float64) for n, scale in ((3, 0.3), (2, 2.0), (3, 1.0)))
    start = torch.randn(3, generator=g, dtype=torch.float64)
    system = System(
        start,
        [torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(HORIZON)],
        lambda index, x, u: A @ x + B @ u,
        lambda x, u: (x @ Q @ x + u @ R @ u) / 2,
        lambda x: x @ F @ x / 2,
    )
    gains, P = [], F
    for _ in range(HORIZON):
        K = torch.linalg.solve(R + B.mT @ P @ B, B.mT @ P @ A)
        gains.insert(0, K)
        P = Q + A.mT @ P @ (A - B @ K)
    controls, x = [], start
    for K in gains:
        controls.append(-K @ x)
        x = A @ x + B @ controls[-1]
    return system, controls


@pytest.mark.parametrize("msa", [MSA(0.05), MSA(0.02, ascents=3), MSA(0.02, ascents=3, rho=0.5)], ids=str)
def test_msa_converges_to_the_riccati_solution(msa):
    system, optimal = problem()
    losses = [msa.update(system).loss for _ in range(400)]
    torch.testing.assert_close([u.detach() for u in system.control], optimal, rtol=0, atol=1e-6)
    assert losses[-1] < losses[0]


def test_costates_are_the_negative_slopes_of_what_is_still_to_come():
    system, _ = problem()
    sweep = system.sweep()
    xs = [step.x for step in sweep.steps]
    states = [system.start]
    loss = torch.zeros((), dtype=torch.float64)
    for index, control in enumerate(system.control):
        states[-1] = states[-1].detach().requires_grad_() if index == 0 else states[-1]
        loss = loss + system.cost(states[-1], control)
        states.append(system.step(index, states[-1], control))
    loss = loss + system.terminal(states[-1])
    assert float(loss.detach()) == pytest.approx(sweep.loss, abs=1e-12)
    slope = torch.autograd.grad(loss, system.control)
    torch.testing.assert_close(
        [sweep.slope()[f"u{i}"] for i in range(HORIZON)], [-s for s in slope], rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(sweep.costates[-1], -sweep.steps[-1].after.detach(), rtol=0, atol=1e-12)
    assert len(xs) == HORIZON


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="rate above 0"):
        MSA(0.0)
