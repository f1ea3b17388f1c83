"""A network as a discrete dynamical system, and its two sweeps: states forward, co-states backward.

    x_{j+1} = f_j(x_j, d_j)              d_j the controls of step j: the leaves of a delta that act there
    J = Phi(x_T) + sum_j R_j(x_j, d_j)   Phi the terminal cost (the loss), R_j the running cost
    p_T = -grad Phi(x_T)                 p_j = grad_x H_j(x_j, p_{j+1}, d_j)
    H_j(x, p, d) = p . f_j(x, d) - R_j(x, d)

Sums run over a batch, so that grad_d sum_j H_j = -grad_d J (Pontryagin's maximum principle in discrete time: Li and Hao,
2018, arXiv:1803.01299; for deltas: Ding et al., 2022, section 4.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Controls = Mapping[str, Tensor]
Cost = Callable[[Controls], Tensor]


def no_cost(controls: Controls) -> Tensor:
    """Return 0: controls are free."""
    return torch.zeros(())


@dataclass(frozen=True)
class WeightDecay:
    """R(d) = rate / 2 |d|^2, the running cost of a regularised delta."""

    rate: float

    def __call__(self, controls: Controls) -> Tensor:
        squares = [tensor.square().sum() for tensor in controls.values()]
        return self.rate / 2 * torch.stack(squares).sum() if squares else torch.zeros(())


@dataclass
class Step:
    """One step at the present controls: its state x_j, what it makes of it, y, and where the next graph begins, `after`.

    `advance` computes f_j(x_j, d_j) with the values that the controls have when it is called, differentiable in both; it is
    None where the step cannot be run by itself, as that of the embeddings. A sweep adds p_{j+1}, `controls`, those that
    act here, by name, and `slope`, grad_d H_j by these names.
    """

    name: str
    x: Tensor
    y: Tensor
    after: Tensor
    advance: Callable[[], Tensor] | None
    cost: Callable[[Controls], Tensor]
    p: Tensor = field(default_factory=lambda: torch.empty(0))
    controls: dict[str, Tensor] = field(default_factory=dict)
    slope: dict[str, Tensor] = field(default_factory=dict)

    def hamiltonian(self) -> Tensor:
        """Return H_j(x_j, p_{j+1}, d_j), a scalar, at the controls as they are now where the step can be run by itself."""
        ahead = self.y.detach() if self.advance is None else self.advance()
        return (self.p * ahead).sum() - self.cost(self.controls)


@dataclass
class Sweep:
    """Both sweeps at one point: the steps in the order in which they are taken, J, the terminal cost, and its own slope.

    `terminal` is -grad_d Phi by name, for controls that act behind the last state (a trained head).
    """

    steps: list[Step]
    loss: float
    terminal: dict[str, Tensor]

    @property
    def costates(self) -> list[Tensor]:
        """p_1 to p_T, one for the output of each step."""
        return [step.p for step in self.steps]

    def slope(self) -> dict[str, Tensor]:
        """Return sum_j grad_d H_j, which is -grad_d J, by the names of the controls."""
        total = {name: tensor.clone() for name, tensor in self.terminal.items()}
        for step in self.steps:
            for name, own in step.slope.items():
                total[name] = total[name] + own if name in total else own.clone()
        return total


class Dynamics(ABC):
    """Something that is controlled: it runs forward at its present controls, cut into steps, and backward."""

    @property
    @abstractmethod
    def controls(self) -> dict[str, Tensor]:
        """All controls by name; they are changed in place."""

    @abstractmethod
    def run(self) -> tuple[list[Step], Tensor]:
        """Run forward: return the steps, each from a state that begins a graph of its own, and Phi(x_T)."""

    def sweep(self) -> Sweep:
        """Run forward and backward at the present controls."""
        steps, terminal = self.run()
        starts = [step.after for step in steps]
        found = _gradients(-terminal, None, [*starts, *self.controls.values()])
        self.backward(steps, found[: len(starts)])
        total = terminal.detach() + sum(step.cost(step.controls).detach().to(terminal) for step in steps)
        ends = zip(self.controls, found[len(starts) :], strict=True)
        return Sweep(steps, float(total), {name: end for name, end in ends if end is not None})

    def backward(self, steps: list[Step], costates: Sequence[Tensor | None]) -> None:
        """Give every step its co-state, controls and slope, from what `costates` [one a step] hold of its output already."""
        for place in reversed(range(len(steps))):
            costates = self.pull(steps, place, costates)

    def pull(self, steps: list[Step], place: int, costates: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Give one step its co-state, controls and slope; return the co-states with what it adds to those of earlier steps."""
        starts, step, p = [step.after for step in steps], steps[place], costates[place]
        step.p = torch.zeros_like(step.y) if p is None else p
        through = _gradients(step.y, step.p, [*starts, *self.controls.values()])
        acting = zip(self.controls.items(), through[len(starts) :], strict=True)
        step.controls = {name: tensor for (name, tensor), slope in acting if slope is not None}
        paid = _gradients(-step.cost(step.controls), None, [*starts, *self.controls.values()])
        slopes = [_sum(a, b) for a, b in zip(through, paid, strict=True)]
        own = zip(self.controls, slopes[len(starts) :], strict=True)
        step.slope = {name: slope for name, slope in own if slope is not None}
        return [_sum(a, b) for a, b in zip(costates, slopes[: len(starts)], strict=True)]


def _gradients(of: Tensor, along: Tensor | None, to: Sequence[Tensor]) -> list[Tensor | None]:
    if not of.requires_grad:
        return [None] * len(to)
    return list(torch.autograd.grad(of, to, along, retain_graph=True, allow_unused=True))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@dataclass
class System(Dynamics):
    """A system that is written down: x_{j+1} = f_j(x_j, u_j) from `start`, `horizon` steps, one control for each.

    `cost` is R(x, u), `terminal` is Phi(x).
    """

    start: Tensor
    control: list[Tensor]
    step: Callable[[int, Tensor, Tensor], Tensor]
    cost: Callable[[Tensor, Tensor], Tensor]
    terminal: Callable[[Tensor], Tensor]

    @property
    def controls(self) -> dict[str, Tensor]:
        return {f"u{index}": control for index, control in enumerate(self.control)}

    def run(self) -> tuple[list[Step], Tensor]:
        steps, x = [], begin(self.start)
        for index, control in enumerate(self.control):
            steps.append(self._step(index, x, control))
            x = steps[-1].after
        return steps, self.terminal(x)

    def _step(self, index: int, x: Tensor, control: Tensor) -> Step:
        def advance() -> Tensor:
            return self.step(index, x, control)

        y = advance()
        return Step(f"step {index}", x, y, begin(y), advance, lambda controls: self.cost(x, control))


def begin(state: Tensor) -> Tensor:
    """Return a state at which a new graph begins."""
    return state.detach().requires_grad_()
