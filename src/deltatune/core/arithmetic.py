"""Arithmetic on weights of one method: linear combination, negation, spherical interpolation.

    W' = W + sum_i c_i Delta_i        Delta_i = W'_i - W

computed with the leaves, so that the result is of the delta's own method: where its change is linear in its trained leaves
t, with the neutral start t_0, and for LoRA by concatenation, which is exact where a mean of A and of B is not:

    t = t_0 + sum_i c_i (t_i - t_0)        B = (c_1 s_1 B_1, ..., c_n s_n B_n) / s   A = (A_1; ...; A_n)   s = s_1

Every function returns the new weights and a `Report` of the error of every parameter against the exact change in float64,
and raises `DeltaTuneError` above its tolerance. `core.task_vectors` computes with the changes of any other deltas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.convert import Changes, changes, lora, measure
from deltatune.core.delta import Delta, Placement, Term, place
from deltatune.core.method import Bag, Method
from deltatune.core.report import TOLERANCE, refuse
from deltatune.core.spec import concrete
from deltatune.core.task_vectors import Result, check_operands, sum_of, total
from deltatune.core.weights import Weights, completed, generate
from deltatune.errors import DeltaTuneError

Held = Mapping[str, Tensor]


def combine(
    model: nn.Module,
    weights: Sequence[Weights],
    coefficients: Sequence[float],
    tolerance: float = TOLERANCE,
    check: bool = True,
) -> Result:
    """Return weights of the same method whose change is sum_i c_i Delta_i: leaf by leaf, LoRAs of any ranks by concatenation.

    Raises `DeltaTuneError` for a method whose change is not linear in its leaves; `task_arithmetic` takes it.
    """
    check_operands(weights, coefficients)
    each = [changes(model, w, check) for w in weights]
    exact, sizes = total(each, coefficients)
    result = _combined(model, weights, coefficients)
    report = measure(model, result, exact, tolerance, sizes)
    refuse(
        report,
        f"the change is not linear in the leaves of {result.delta}, or too small beside their start. {_instead(coefficients)}",
    )
    return result, report


def negate(model: nn.Module, weights: Weights, tolerance: float = TOLERANCE, check: bool = True) -> Result:
    """Return weights of the same method with the change -Delta: what they taught is unlearned (Ilharco et al., 2023, arXiv:2212.04089)."""
    return combine(model, [weights], [-1.0], tolerance, check)


def slerp(
    model: nn.Module, a: Weights, b: Weights, t: float, tolerance: float = TOLERANCE, check: bool = True
) -> Result:
    """Return (sin((1 - t) w) Delta_a + sin(t w) Delta_b) / sin(w), w the angle between the two changes (Shoemake, 1985).

    The angle is that of the deltas as a whole, so changes of one norm keep it; parallel ones are interpolated linearly.
    """
    if not 0 <= t <= 1:
        raise DeltaTuneError(f"slerp goes from t=0 to t=1; found t={t}.")
    of_a, of_b = changes(model, a, check), changes(model, b, check)
    dot = sum(float((of_a[name] * of_b[name]).sum()) for name in of_a.keys() & of_b.keys())
    size = _norm(of_a) * _norm(of_b)
    cosine = max(-1.0, min(1.0, dot / size)) if size else 1.0
    angle = math.acos(cosine)
    if math.pi - angle < 1e-6:
        raise DeltaTuneError("the two changes point in opposite directions, between which no arc is the shortest.")
    if angle < 1e-6:
        return combine(model, [a, b], [1 - t, t], tolerance, check)
    arc = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return combine(model, [a, b], arc, tolerance, check)


def _norm(change: Changes) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in change.values()))


def _instead(coefficients: Sequence[float]) -> str:
    return f"Compute with the changes instead: task_arithmetic(model, weights, {[float(c) for c in coefficients]})."


@torch.no_grad()
def _combined(model: nn.Module, weights: Sequence[Weights], coefficients: Sequence[float]) -> Weights:
    first = weights[0]
    placements = [place(model, w.delta) for w in weights]
    held = [completed(model, w, ps) for ps, w in zip(placements, weights, strict=True)]
    delta = Delta(tuple(_term(i, weights, placements, held, coefficients) for i in range(len(first.delta.terms))))
    start = generate(model, [p for p in placements[0] if not is_lora(p.method)], first.seed, "trained", {})
    tensors: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    for after, *before in zip(place(model, delta), *placements, strict=True):
        if is_lora(after.method):
            made = _concatenated(after, before, held, coefficients)
        else:
            made = _leaf_by_leaf(after, held, start, coefficients)
        for leaf, declared in after.leaves.items():
            if declared.kind != "seeded" or after.name(leaf) in first.fixed:
                (tensors if declared.trained else fixed)[after.name(leaf)] = made[leaf]
    return Weights(delta, tensors, first.backbone, first.seed, fixed=fixed)


def is_lora(method: Method) -> bool:
    """Whether a method computes with the factors of a LoRA."""
    return isinstance(method.computes, concrete(Method).get("LoRA", ()))


def _term(
    index: int,
    weights: Sequence[Weights],
    placements: list[list[Placement]],
    held: Sequence[Held],
    coefficients: Sequence[float],
) -> Term:
    """Return the term that holds the combination: the one that all have, or a LoRA of the sum of the ranks."""
    deltas = [w.delta for w in weights]
    first = deltas[0].terms[index]
    for delta in deltas:
        alike = len(delta.terms) == len(deltas[0].terms) and delta.terms[index].where == first.where
        same = alike and delta.terms[index].method == first.method
        if not same and not (alike and is_lora(first.method) and is_lora(delta.terms[index].method)):
            unlike = f"{deltas[0]} and {delta} are unlike, so no leaf of the one goes with a leaf of the other"
            raise DeltaTuneError(f"{unlike}. {_instead(coefficients)}")
    if not is_lora(first.method):
        return first
    here = [next(p for p in ps if p.term == index) for ps in placements]
    ranks = [_factors(p, h)[0].shape[0] for p, h in zip(here, held, strict=True)]
    method: Any = first.method.computes
    if method is first.method and sum(ranks) == method.rank:
        return first
    least = min((p.site for p in placements[0] if p.term == index), key=lambda site: min(site.d_in, site.d_out))
    if sum(ranks) > min(least.d_in, least.d_out):
        raise DeltaTuneError(
            f"the ranks {ranks} add up to {sum(ranks)}, more than {least.path!r} can have ({least.d_out} x {least.d_in}); write "
            f"task_arithmetic(model, weights, {[float(c) for c in coefficients]}, rank={min(least.d_in, least.d_out)})."
        )
    return Term(first.where, lora(sum(ranks), method.alpha / method.rank * sum(ranks)))


def _factors(placement: Placement, held: Held) -> tuple[Tensor, Tensor]:
    return factors(placement.method, {leaf: held[placement.name(leaf)] for leaf in placement.leaves})


def factors(lora: Method, leaves: Held) -> tuple[Tensor, Tensor]:
    """Return A and s B of a LoRA's leaves at one site in float64, so that the change is s B A."""
    method: Any = lora.computes
    p: Any = lora.unfold(Bag({n: t.double() if t.is_floating_point() else t for n, t in leaves.items()}))
    return p.A, p.B * (method.alpha / method.rank)


def _concatenated(
    after: Placement, before: Sequence[Placement], held: Sequence[Held], coefficients: Sequence[float]
) -> dict[str, Tensor]:
    method: Any = after.method
    factors = [_factors(p, h) for p, h in zip(before, held, strict=True)]
    B = [c * sB for c, (_, sB) in zip(coefficients, factors, strict=True)]
    A = torch.cat([A for A, _ in factors])
    return {"A": A.float(), "B": (torch.cat(B, 1) / (method.alpha / method.rank)).float()}


def _leaf_by_leaf(after: Placement, held: Sequence[Held], start: Held, coefficients: Sequence[float]) -> Held:
    """Return t_0 + sum_i c_i (t_i - t_0) of the trained leaves; the others have to be the same in all weights."""
    made: dict[str, Tensor] = {}
    for leaf, declared in after.leaves.items():
        name = after.name(leaf)
        each = [h[name] for h in held]
        if declared.trained:
            t0 = start[name].double()
            made[leaf] = (t0 + sum_of([c * (t.double() - t0) for c, t in zip(coefficients, each, strict=True)])).to(
                each[0].dtype
            )
        elif not all(torch.equal(t, each[0]) for t in each):
            raise DeltaTuneError(
                f"{leaf!r} of {after.method} at {after.site.address!r} is not trained and not the same in all weights, so their "
                f"leaves do not add up (other seeds or other evidence). {_instead(coefficients)}"
            )
        else:
            made[leaf] = each[0]
    return made
