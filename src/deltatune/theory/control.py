"""What each step of an attached backbone contributes, as optimal control sees it.

    H_j = p_{j+1} . f_j(x_j, d_j) - R_j                    the Hamiltonian
    V_j = max_{|d - d_j| <= r |d_j|} H_j(d) - H_j(d_j)     how far the controls are from Pontryagin's maximum, V_j >= 0
    u_j = f_j(x_j, d_j) - f_j(x_j, no delta)               what the controls add to the state; its energy is |u_j|^2

Sums run over the batch. (Li, Chen, Tai and E, 2018, arXiv:1710.09513; Ding et al., 2022, section 4.2.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.attach import Attachment
from deltatune.core.calls import Ports, standing
from deltatune.core.ports import PORTS
from deltatune.errors import DeltaTuneError
from deltatune.theory.backbone import BackboneDynamics
from deltatune.theory.dynamics import Step
from deltatune.theory.finding import Finding
from deltatune.theory.sides import restored


@dataclass(frozen=True)
class StepReport:
    """One step: its controls, its Hamiltonian, |grad_d H|, V_j, |p_{j+1}|, |u_j|^2 and |u_j| over |f_j(x_j) - x_j|.

    `violation` and `energy` are None at the embeddings, which are no step that can be run by itself.
    """

    name: str
    parameters: int
    hamiltonian: float
    slope: float
    violation: float | None
    costate: float
    energy: float | None
    share: float | None


@dataclass(frozen=True)
class ControlReport(Finding):
    """All steps of one batch, in the order in which they run, and J."""

    loss: float
    steps: tuple[StepReport, ...]

    @property
    def violation(self) -> float:
        """The sum of V_j: what the Hamiltonians could still gain within the radius."""
        return sum(step.violation or 0.0 for step in self.steps)

    @property
    def finding(self) -> str:
        """One sentence: where the controls are furthest from their maximum, and where they do most."""
        known = [step for step in self.steps if step.violation is not None and step.energy is not None]
        furthest, strongest = max(known, key=lambda s: s.violation or 0), max(known, key=lambda s: s.energy or 0)
        return (
            f"Pontryagin's condition is violated most at {furthest.name} ({furthest.violation:.3g} of {self.violation:.3g} in all), "
            f"and the controls move the state most at {strongest.name}."
        )


def control_report(system: BackboneDynamics, radius: float = 0.1, ascents: int = 4) -> ControlReport:
    """Measure every step of a system at its present controls, which stay as they are.

    V_j is sought by `ascents` gradient steps inside the ball of `radius` |d_j|, the best point seen counts. Raises
    `DeltaTuneError` where a block does not give the same when it is run by itself.
    """
    sweep = system.sweep()
    return ControlReport(sweep.loss, tuple(_report(system, step, radius, ascents) for step in sweep.steps))


def _report(system: BackboneDynamics, step: Step, radius: float, ascents: int) -> StepReport:
    count = sum(tensor.numel() for tensor in step.controls.values())
    with torch.no_grad():
        y = step.y.detach()
        hamiltonian = float((step.p * y).sum() - step.cost(step.controls))
        common = (step.name, count, hamiltonian, _norm(step.slope.values()))
        if step.advance is None:
            return StepReport(*common, None, float(step.p.norm()), None, None)
        _check(step, step.advance())
        with without(system.attachment):
            bare = step.advance()
        added = (y - bare).norm()
        share = float(added / (y - step.x).norm().clamp(min=torch.finfo(y.dtype).tiny))
    gained = violation(step, radius, ascents)
    return StepReport(*common, gained, float(step.p.norm()), float(added.square()), share)


def violation(step: Step, radius: float, ascents: int) -> float:
    """Return V_j, by gradient ascent from d_j in steps that are as long as the radius together; 0 without controls."""
    if not step.controls or step.advance is None:
        return 0.0
    controls = list(step.controls.values())
    values = []
    with restored(controls) as before:
        reach = radius * max(_norm(before), 1e-3)
        for ascent in range(ascents + 1):
            value = step.hamiltonian()
            values.append(float(value.detach()))
            if ascent < ascents:
                slopes = torch.autograd.grad(value, controls, allow_unused=True)
                _ascend(controls, slopes, reach / ascents)
    return max(values) - values[0]


@torch.no_grad()
def _ascend(controls: list[Tensor], slopes: Any, step: float) -> None:
    # Each step is reach / ascents long, so no number of them leaves the ball.
    size = _norm(slope for slope in slopes if slope is not None)
    for tensor, slope in zip(controls, slopes, strict=True):
        if slope is not None and size:
            tensor += step / size * slope


def _norm(tensors: Any) -> float:
    squares = [float(tensor.detach().square().sum()) for tensor in tensors]
    return sum(squares) ** 0.5


def _check(step: Step, again: Tensor) -> None:
    """Raise `DeltaTuneError` where a step that was run by itself gave something else than in the sweep."""
    scale = step.y.detach().abs().max().clamp(min=1e-12)
    if again.shape != step.y.shape or float((again - step.y.detach()).abs().max() / scale) > 1e-3:
        raise DeltaTuneError(
            f"the block {step.name!r} gives something else when it is run by itself, so its Hamiltonian cannot be looked at beside "
            "the present controls; switch dropout off (model.eval()), and attach no soft prompt: take LoRA, prefixes or adapters, or "
            "ask of a prompt the gap or the landscape, which run the model as a whole."
        )


@contextmanager
def without(attachment: Attachment) -> Iterator[None]:
    """The scope in which one attachment's ports do nothing."""
    inside: list[tuple[nn.Module, Ports]] = []
    for module in attachment.model.modules():
        ports: Ports | None = module.__dict__.get(PORTS)
        if ports is not None:
            rest = Ports(module)
            rest.change([entry for entry in ports.entries if entry[0] != attachment.name])
            inside.append((module, rest))
    with standing(inside):
        yield
