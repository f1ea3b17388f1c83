"""The method of successive approximations: training as the search for an optimal controller, step by step.

    forward sweep for x, backward sweep for p, then d_j <- argmax_d H_j(x_j, p_{j+1}, d)      MSA
    d_j <- argmax_d H_j - rho / 2 |x_{j+1} - f_j(x_j, d)|^2 - rho / 2 |p_j - grad_x H_j|^2     extended MSA

(Li, Chen, Tai and E, 2018, arXiv:1710.09513). The maximum is approached by gradient ascent; one step of it is
back-propagation with gradient descent, because grad_d sum_j H_j = -grad_d J.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltatune.errors import DeltaTuneError
from deltatune.theory.dynamics import Dynamics, Step, Sweep


@dataclass(frozen=True)
class MSA:
    """How the Hamiltonian of each step is maximised: `ascents` gradient steps of size `rate`, `rho` the penalty of extended MSA.

    Raises `DeltaTuneError` for a rate or a penalty below 0, or no ascent.
    """

    rate: float
    ascents: int = 1
    rho: float = 0.0

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.ascents < 1 or self.rho < 0:
            raise DeltaTuneError(f"{self}: write a rate above 0, at least one ascent and a rho of at least 0.")

    def update(self, dynamics: Dynamics) -> Sweep:
        """Take one iteration: sweep, then move every control in place; return the sweep, made before the move."""
        sweep = dynamics.sweep()
        before = {name: tensor.detach().clone() for name, tensor in dynamics.controls.items()}
        after = dict(before)
        for name, slope in sweep.terminal.items():  # no step's Hamiltonian holds what acts behind the last state
            after[name] = after[name] + self.rate * slope
        costates = {id(step.after): step.p for step in sweep.steps}
        for step in sweep.steps:
            for name, moved in self._maximise(step, costates.get(id(step.x))).items():
                after[name] = after[name] + (moved - before[name])
        _write(dynamics.controls, after)
        return sweep

    def _maximise(self, step: Step, p: Tensor | None) -> dict[str, Tensor]:
        """Return the controls that raise one step's Hamiltonian, and put the old ones back."""
        before = {name: tensor.detach().clone() for name, tensor in step.controls.items()}
        reached = step.y.detach()
        beside = step.slope
        if self.ascents > 1 or self.rho:  # what acts through what the step reads beside its state keeps its first slope
            own = MSA(self.rate)._slopes(step, reached, p)
            beside = {name: slope - own[name] if name in own else slope for name, slope in step.slope.items()}
        for _ in range(self.ascents):
            slopes = {} if beside is step.slope else self._slopes(step, reached, p)
            with torch.no_grad():
                for name, slope in beside.items():
                    step.controls[name] += self.rate * (slope + slopes[name] if name in slopes else slope)
        moved = {name: tensor.detach().clone() for name, tensor in step.controls.items()}
        _write(step.controls, before)
        return moved

    def _slopes(self, step: Step, reached: Tensor, p: Tensor | None) -> dict[str, Tensor]:
        if not step.controls or step.advance is None:
            return step.slope
        ahead = step.advance()
        gain = (step.p * ahead).sum() - step.cost(step.controls)
        if self.rho:
            missed = (reached - ahead).square().sum()
            if p is not None:
                (slope,) = torch.autograd.grad(gain, step.x, create_graph=True)
                missed = missed + (p - slope).square().sum()
            gain = gain - self.rho / 2 * missed
        found = torch.autograd.grad(gain, list(step.controls.values()), allow_unused=True)
        return {name: slope for name, slope in zip(step.controls, found, strict=True) if slope is not None}


def _write(controls: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in controls.items():
            tensor.copy_(values[name])
