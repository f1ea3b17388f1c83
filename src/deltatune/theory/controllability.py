"""Controllability: how far the controls of each step can move the last state, per layer and per parameter.

    W_j = J_j J_j^T        J_j = d x_T / d d_j, the Gramian of step j     [n, n] for a last state of n numbers
    trace W_j = |J_j|^2    estimated without bias by n / k sum_i |J_j^T v_i|^2 for k random orthonormal directions v_i
    V^T W_j V              the Gramian seen from these directions [k, k], whose eigenvalues are its spectrum here

One backward sweep for each direction, all of them step by step, so that only one step's slopes are in memory and no matrix of
the state's size is. (Controllability Gramian: Kalman, 1963; of deltas: Ding et al., 2022, section 4.2.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltatune.errors import DeltaTuneError
from deltatune.theory.dynamics import Dynamics, Step, no_cost
from deltatune.theory.finding import Finding


@dataclass(frozen=True)
class Reach:
    """One step: its parameters, the trace of its Gramian, the same for each parameter, and the spectrum, falling."""

    name: str
    parameters: int
    trace: float
    per_parameter: float
    spectrum: tuple[float, ...]

    @property
    def effective_rank(self) -> float:
        """(sum s)^2 / sum s^2 of the spectrum: how many directions are moved alike; 0 where nothing is moved."""
        total, squares = sum(self.spectrum), sum(value**2 for value in self.spectrum)
        return total**2 / squares if squares else 0.0


@dataclass(frozen=True)
class Controllability(Finding):
    """The reach of every step, in the order in which they run."""

    steps: tuple[Reach, ...]

    @property
    def finding(self) -> str:
        """One sentence: which step's controls reach the last state most, in all and for each parameter."""
        acting = [step for step in self.steps if step.parameters]
        if not acting:
            return "No step has controls of its own: they act behind the last state."
        most, dearest = max(acting, key=lambda s: s.trace), max(acting, key=lambda s: s.per_parameter)
        return f"The last state is moved most by the controls of {most.name}, and most for each parameter by those of {dearest.name}."


def controllability(
    system: Dynamics, probes: int = 8, seed: int = 0, watch: Callable[[Tensor], Tensor] = lambda state: state
) -> Controllability:
    """Measure the reach of every step from `probes` random directions of the last state.

    `watch` picks what of the last state [batch, length, d] counts, for example the position of the answer. Raises
    `DeltaTuneError` when there is nothing to train, or more probes than numbers.
    """
    if not system.controls:
        raise DeltaTuneError("this delta has nothing that is trained, so it controls nothing; attach one that has.")
    steps = [replace(step, cost=no_cost) for step in system.run()[0]]  # a reach has no price
    seen = watch(steps[-1].after)
    if not 0 < probes <= seen.numel():
        raise DeltaTuneError(f"{probes} probes of a state of {seen.numel()} numbers; write 1 to {seen.numel()}.")
    directions = _orthonormal(seen.numel(), probes, seed).to(seen)
    costates: list[Sequence[Tensor | None]] = []
    for direction in directions:
        (along,) = torch.autograd.grad(seen, steps[-1].after, direction.view_as(seen), retain_graph=True)
        costates.append([*[None] * (len(steps) - 1), along])
    found = []
    for place in reversed(range(len(steps))):
        slopes = []
        for probe in range(probes):
            costates[probe] = system.pull(steps, place, costates[probe])
            own = steps[place].slope.values()
            slopes.append(torch.cat([slope.flatten() for slope in own]) if own else seen.new_zeros(1))
        found.append(_reach(steps[place], torch.stack(slopes), seen.numel()))
    return Controllability(tuple(reversed(found)))


def _reach(step: Step, slopes: Tensor, size: int) -> Reach:
    """Return the reach of a step from J_j^T v_i, [k, parameters]."""
    count = sum(tensor.numel() for tensor in step.controls.values())
    spectrum = torch.linalg.eigvalsh((slopes @ slopes.mT).double()).clamp(min=0).flip(0)
    trace = float(spectrum.sum()) * size / len(slopes)
    return Reach(step.name, count, trace, trace / count if count else 0.0, tuple(spectrum.tolist()))


def _orthonormal(size: int, count: int, seed: int) -> Tensor:
    """Return `count` random orthonormal directions [count, size]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))[0].mT
