"""The steps that measure finished runs, each for one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import deltatune as dt
from deltatune.core.convert import changes
from deltatune.core.weights import Weights
from deltatune.theory.backbone import BackboneDynamics
from deltatune.theory.bound import check_bound
from deltatune.theory.control import control_report
from deltatune.theory.controllability import controllability
from deltatune.theory.curvature import sharpness
from deltatune.theory.function_gap import compare_answers
from deltatune.theory.residual import best_mask, once, residuals
from deltatune.theory.similarity import compare_states
from deltatune.theory.size import smallest_size
from deltatune.theory.spectrum import Spectra, spectra
from deltatune.tuning import Run
from studies.theory.data import Batches, examples_of
from studies.theory.state import State

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARES = (0.5, 0.9, 0.99)
EVERYWHERE = "{attn.{q,k,v,o},cross.{q,k,v,o},ffn.{gate,up,down}}"
FAMILIES = ("LoRA(rank=8)", f'LoRA(rank=8).at("{EVERYWHERE}")', f'LoRA(rank=32).at("{EVERYWHERE}")', "BitFit()")
DID = "DID(dim=1000)"  # of the first seed only: its projection takes longer than all the rest
MASKS = (0.005, 0.05)


def finished(state: State, seed: int) -> Iterator[tuple[str, str, Run]]:
    """Yield method, task and run of all that is trained with a seed."""
    for task in state.plan.tasks:
        for method, choice in state.methods().items():
            run = state.plan.run(choice, task, seed)
            if state.has(run):
                yield method, task, run


def each(state: State, seed: int, name: str, measure: Callable[[State, Run], Any], *methods: str) -> None:
    """Measure the finished runs of some methods, of all without any."""
    for method, task, run in finished(state, seed):
        if not methods or method in methods:
            state.measured(f"{name}-{method}-{task}-{seed}", partial(measure, state, run))


def spectrum(state: State, seed: int) -> None:
    """Measure what Full and LoRA did to every matrix, and what families of deltas leave of Full's change."""
    each(state, seed, "spectrum", _spectrum, "Full", "LoRA")
    each(state, seed, "residual", _residuals, "Full")


def control(state: State, seed: int) -> None:
    """Measure Pontryagin's condition and controllability at fresh and at trained weights."""
    each(state, seed, "control", _control)


def function(state: State, seed: int) -> None:
    """Compare what Full and each other side compute, and the sharpness of the first task's and seed's deltas."""
    each(state, seed, "function", _function)
    for method, task, run in finished(state, seed):
        if method != "Full" and task == state.plan.tasks[0] and seed == state.plan.seeds[0]:
            state.measured(f"sharpness-{method}-{task}-{seed}", partial(_sharpness, state, run))


def _spectrum(state: State, run: Run) -> dict[str, Any]:
    found = spectra(state.backbone.model, state.weights(run))
    rows = [
        [s.address, s.role, s.layer, s.energy**0.5, s.effective_rank, s.stable_rank, *map(s.rank, SHARES)]
        for s in found.sites
    ]
    placed = Spectra(tuple(s for s in found.sites if s.role in ("attn.q", "attn.v", "cross.q", "cross.v")))
    linear = Spectra(tuple(s for s in found.sites if s.role.startswith(("attn.", "cross.", "ffn."))))
    return {
        "finding": found.finding,
        "rest": found.rest,
        "sites": rows,
        "size": {name: _sizes(some) for name, some in (("qv", placed), ("linear", linear))},
    }


def _sizes(found: Spectra) -> dict[str, Any]:
    curve = smallest_size(found).curve
    kept = [curve[min(rank, len(curve) - 1)] for rank in RANKS]
    return {"kept": kept, "rank": {share: smallest_size(found, share).size for share in SHARES}}


def _residuals(state: State, run: Run) -> list[dict[str, Any]]:
    model, weights = state.backbone.model, state.weights(run)
    families = [dt.parse(text) for text in (*FAMILIES, *([DID] if run.seed == 0 else []))]
    found = residuals(model, weights, families, run.seed)
    wanted = once(model, changes(model, weights))
    found += [best_mask(wanted, share) for share in MASKS]
    return [{"family": r.family, "parameters": r.parameters, "norm": r.norm, "total": r.total} for r in found]


def _control(state: State, run: Run) -> dict[str, Any]:
    fresh = dt.init(dt.parse(run.delta), state.backbone.model, run.seed)
    batches = examples_of(state, run.task, "train", run.recipe.batch, run.seed)
    sides = {"before": fresh, "after": state.weights(run)}
    return {side: _controlled(state, weights, batches) for side, weights in sides.items()}


def _controlled(state: State, weights: Weights, batches: Batches) -> dict[str, Any]:
    model: Any = state.backbone.model.eval()
    with dt.attach(model, weights) as attached:
        system = BackboneDynamics(attached, lambda: model(**batches[0]).loss)
        reach = controllability(system, watch=lambda state: state[:, :1])  # where the first token of the answer is told
        return {**control_report(system).to_json(), "reach": reach.to_json()["steps"]}


def _function(state: State, run: Run) -> dict[str, Any]:
    model = state.backbone.model
    full = state.weights(state.plan.run(state.plan.methods["Full"], run.task, run.seed))
    own = None if run.delta == "Full()" else state.weights(run)  # Full is compared with the bare backbone
    batches = examples_of(state, run.task, "dev", 64, run.seed)
    gap = compare_answers(model, full, own, batches)
    alike = compare_states(model, full, own, batches)
    found = {"kl": gap.kl, "kl_error": gap.kl_error, "agreement": gap.agreement, "cka": dict(alike.cka)}
    if run.delta == "Full()" and run.seed == 0:
        bound = check_bound(model, full, dt.parse(FAMILIES[1]), batches[:2], tolerance=1.0)
        found["bound"] = bound.to_json() | {"gap": bound.gap, "bound": bound.bound, "tight": bound.tight}
    return found


def _sharpness(state: State, run: Run) -> dict[str, Any]:
    batches = examples_of(state, run.task, "train", 2 * run.recipe.batch, run.seed)
    sides = {"before": dt.init(dt.parse(run.delta), state.backbone.model, run.seed), "after": state.weights(run)}
    found = {}
    for side, weights in sides.items():
        with dt.attach(state.backbone.model, weights) as attached:
            measured = sharpness(attached, batches, k=1, steps=12)
        found[side] = {"largest": measured.values[0], "residual": measured.residuals[0], "least": measured.least}
    return found
