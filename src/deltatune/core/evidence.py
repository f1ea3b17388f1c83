"""Evidence: what data-dependent initialisers look at, measured on a few rows of the task before a delta is attached.

fisher    F = mean over rows of g * g, g the gradient of the loss, by parameter path (diagonal; Sung et al., 2021)
gradient  mean over rows of g, by parameter path
inputs    mean over tokens of x x^T, [d_in, d_in], by module path
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.delta import Delta, Placement, as_delta, place
from deltatune.core.method import Method
from deltatune.core.site import read_by
from deltatune.errors import DeltaTuneError

GRADIENTS, INPUTS = ("fisher", "gradient"), "inputs"
MEASURED = frozenset({*GRADIENTS, INPUTS})


def needs(model: nn.Module, delta: Delta | Method) -> frozenset[str]:
    """Return the kinds of evidence that `delta` asks for on `model`."""
    return frozenset().union(*(_needs(placement) for placement in place(model, as_delta(delta))))


def evidence(
    model: nn.Module,
    delta: Delta | Method,
    rows: Iterable[Mapping[str, Any]],
    loss: Callable[[Any], Tensor] = lambda output: output.loss,
) -> dict[str, dict[str, Tensor]]:
    """Measure what `delta` needs of `model` on `rows`, each a batch of one row with labels; the model stays as it is.

    Raises `DeltaTuneError` when there are no rows.
    """
    placements = place(model, as_delta(delta))
    for p in placements:
        if INPUTS in _needs(p) and (p.site.kind in ("embedding", "conv") or read_by(model, p.site.path) is not None):
            raise DeltaTuneError(
                f"{p.method} starts from a linear layer's inputs, and {p.site.path!r} is no call of one."
            )
    parameters = {_parameter(p): _tensor(model, p) for p in placements if _needs(p) & set(GRADIENTS)}
    watched = {p.site.path: model.get_submodule(p.site.path) for p in placements if INPUTS in _needs(p)}
    sums = {kind: {name: torch.zeros_like(t) for name, t in parameters.items()} for kind in GRADIENTS}
    moments: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    count = 0
    with _trained(model, list(parameters.values())), _counted(watched, moments, tokens):
        for row in rows:
            count += 1
            with torch.set_grad_enabled(bool(parameters)):
                output = model(**row)
                if parameters:
                    _add(sums, parameters, loss(output))
    if not count:
        raise DeltaTuneError("there are no rows to measure evidence on; give batches of one row with labels.")
    found = {kind: {name: (t / count).cpu() for name, t in by_name.items()} for kind, by_name in sums.items()}
    return {**found, INPUTS: {path: (moments[path] / tokens[path]).cpu() for path in moments}}


def _needs(placement: Placement) -> frozenset[str]:
    return frozenset().union(*(leaf.init.needs for leaf in placement.leaves.values()))


def _parameter(placement: Placement) -> str:
    return ".".join(filter(None, [placement.site.path, placement.site.tensor or "weight"]))


def _tensor(model: nn.Module, placement: Placement) -> nn.Parameter:
    return model.get_parameter(_parameter(placement))


def _add(sums: dict[str, dict[str, Tensor]], parameters: Mapping[str, Tensor], value: Tensor) -> None:
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    for name, g in zip(parameters, gradients, strict=True):
        if g is not None:
            sums["fisher"][name] += g.square()
            sums["gradient"][name] += g


@contextmanager
def _trained(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The scope in which the parameters, and no others, have gradients."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)


@contextmanager
def _counted(modules: Mapping[str, nn.Module], moments: dict[str, Tensor], tokens: dict[str, int]) -> Iterator[None]:
    """The scope in which the inputs of the modules add to their second moments."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().float().flatten(0, -2)
            moments[path] = moments.get(path, 0) + x.mT @ x
            tokens[path] = tokens.get(path, 0) + x.shape[0]

        return add

    handles = [module.register_forward_pre_hook(hook(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
