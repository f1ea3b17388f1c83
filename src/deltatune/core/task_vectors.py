"""Task vectors: what deltas do to a parameter, added up and merged (Ilharco et al., 2023, arXiv:2212.04089).

    Delta_i = W'_i - W        W' = W + f(c_1 Delta_1, ..., c_n Delta_n)

f works on one parameter at a time, in float64, on the changes of any mergeable deltas, alike or not. What it gives is written
as new values (Full), or with `rank` as a LoRA. Every function returns the new weights and a `Report` of the error of
every parameter against the exact f, and raises `DeltaTuneError` above its tolerance. Memory: the changes of all weights
at once, in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from deltatune.core.convert import Changes, changes, written
from deltatune.core.report import TOLERANCE, Report
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError

Result = tuple[Weights, Report]


def task_arithmetic(
    model: nn.Module,
    weights: Sequence[Weights],
    coefficients: Sequence[float],
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    check: bool = True,
) -> Result:
    """Return sum_i c_i Delta_i of any mergeable deltas as new values, or as a LoRA of `rank` (Ilharco et al., 2023, arXiv:2212.04089)."""
    return _on_changes(model, weights, coefficients, lambda name, parts: sum_of(parts), rank, tolerance, check)


def magnitude_prune(
    model: nn.Module,
    weights: Sequence[Weights],
    coefficients: Sequence[float],
    density: float,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    check: bool = True,
) -> Result:
    """Return sum_i c_i trim(Delta_i): of each parameter's change the `density` of entries with the largest magnitude (Han et al., 2015)."""
    _check_density(density)

    def merged(name: str, parts: list[Tensor]) -> Tensor:
        return sum_of([trimmed(part, density) for part in parts])

    return _on_changes(model, weights, coefficients, merged, rank, tolerance, check)


def ties(
    model: nn.Module,
    weights: Sequence[Weights],
    coefficients: Sequence[float],
    density: float,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    check: bool = True,
) -> Result:
    """Return the changes trimmed, their signs elected, and the mean over those that agree (TIES: Yadav et al., 2023, arXiv:2306.01708).

    sign = sgn(sum_i c_i trim(Delta_i)), and each entry is the mean of the c_i trim(Delta_i) that are not zero and have it.
    The paper's merge with its scale lambda has all c_i = lambda.
    """
    _check_density(density)

    def merged(name: str, parts: list[Tensor]) -> Tensor:
        kept = [trimmed(part, density) for part in parts]
        sign = sum_of(kept).sign()
        agree = [(part.sign() == sign) & (part != 0) for part in kept]
        total = sum_of([part * here for part, here in zip(kept, agree, strict=True)])
        return total / sum_of([here.to(total.dtype) for here in agree]).clamp(min=1)

    return _on_changes(model, weights, coefficients, merged, rank, tolerance, check)


def dare(
    model: nn.Module,
    weights: Sequence[Weights],
    coefficients: Sequence[float],
    density: float,
    seed: int = 0,
    rank: int | None = None,
    tolerance: float = TOLERANCE,
    check: bool = True,
) -> Result:
    """Return sum_i c_i m_i Delta_i / density, m_i ~ Bernoulli(density): dropped and rescaled (DARE: Yu et al., 2023, arXiv:2311.03099).

    The masks depend on (seed, i, parameter) alone.
    """
    _check_density(density)

    def merged(name: str, parts: list[Tensor]) -> Tensor:
        masks = [kept_by_chance(part.shape, density, f"{seed}|{i}|{name}") for i, part in enumerate(parts)]
        return sum_of([part * mask / density for part, mask in zip(parts, masks, strict=True)])

    return _on_changes(model, weights, coefficients, merged, rank, tolerance, check)


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors."""
    return sum(parts[1:], parts[0])


def trimmed(change: Tensor, density: float) -> Tensor:
    """Return a change with all but its round(density n) largest entries, and at least one, set to zero."""
    flat = change.flatten()
    best = flat.abs().topk(max(1, round(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy(0, best, flat[best]).view(change.shape)


def kept_by_chance(shape: torch.Size, density: float, identity: str) -> Tensor:
    """Return a mask of independent Bernoulli(density) entries, the same for the same identity."""
    generator = Generator().manual_seed(int.from_bytes(hashlib.sha256(identity.encode()).digest()[:7], "big"))
    return torch.rand(shape, generator=generator, dtype=torch.float64) < density


def _on_changes(
    model: nn.Module,
    weights: Sequence[Weights],
    coefficients: Sequence[float],
    merged: Callable[[str, list[Tensor]], Tensor],
    rank: int | None,
    tolerance: float,
    check: bool,
) -> Result:
    """Write merged(parameter path, [c_i Delta_i]) of every parameter that any of the weights change."""
    check_operands(weights, coefficients)
    each = [changes(model, w, check) for w in weights]
    _, sizes = total(each, coefficients)
    exact: Changes = {}
    for name in dict.fromkeys(name for change in each for name in change):
        none = torch.zeros_like(next(change[name] for change in each if name in change))
        exact[name] = merged(name, [c * ch.pop(name, none) for c, ch in zip(coefficients, each, strict=True)])
    return written(model, exact, weights, rank, tolerance, sizes)


def total(each: Sequence[Changes], coefficients: Sequence[float]) -> tuple[Changes, dict[str, float]]:
    """Return sum_i c_i Delta_i and sum_i |c_i| |Delta_i| of every parameter."""
    exact: Changes = {}
    sizes: dict[str, float] = {}
    for change, c in zip(each, coefficients, strict=True):
        for name, part in change.items():
            exact[name] = exact[name] + c * part if name in exact else c * part
            sizes[name] = sizes.get(name, 0.0) + abs(c) * float(part.norm())
    return exact, sizes


def check_operands(weights: Sequence[Weights], coefficients: Sequence[float]) -> None:
    """Raise `DeltaTuneError` unless there are weights, with one finite coefficient each."""
    if not weights or len(weights) != len(coefficients):
        raise DeltaTuneError(
            f"every weights needs one coefficient; found {len(weights)} weights and {len(coefficients)} coefficients."
        )
    for c in coefficients:
        if not math.isfinite(c):
            raise DeltaTuneError(f"a coefficient is a finite number; found {c}.")


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise DeltaTuneError(f"density={density} is no share of the entries to keep; write one above 0 and up to 1.")
