"""The steps that train, each for one seed."""

from __future__ import annotations

from functools import partial

from deltatune.core.delta import parse
from deltatune.errors import DeltaTuneError
from deltatune.theory.placement import even_worth, place_by_control, place_by_worth, random_worth
from deltatune.tuning.structure import search_structure
from studies.theory.data import examples_of
from studies.theory.state import State


def runs(state: State, seed: int) -> None:
    """Train every method on every task."""
    for task in state.plan.tasks:
        for choice in state.methods().values():
            state.tune(state.plan.run(choice, task, seed))


def prefix(state: State, seed: int) -> None:
    """Train the prefixes whose loop is closed."""
    for task in state.plan.robust["tasks"]:
        state.tune(state.plan.longer(state.chosen("PrefixTuning"), task, seed))


def intrinsic(state: State, seed: int) -> None:
    """Train SAID in every dimension on every task."""
    for task in state.plan.tasks:
        for run in state.plan.swept(task, seed, state.rates()):
            state.tune(run)


def size(state: State, seed: int) -> None:
    """Train LoRA of every rank on every task."""
    for task in state.plan.tasks:
        for run in state.plan.ranks(task, seed).values():
            state.tune(run)


def placement(state: State, seed: int) -> None:
    """Place LoRA in four ways under every budget and train what comes out."""
    for task in state.plan.tasks:
        texts = state.measured(f"placed-{task}-{seed}", partial(_place, state, task, seed))
        for text in (text for own in texts.values() for text in own.values()):
            state.tune(state.plan.placed(text, task, seed))


def _place(state: State, task: str, seed: int) -> dict[str, dict[int, str]]:
    plan, model = state.plan.placement, state.backbone.model.eval()
    candidates, budgets = parse(plan["candidates"]), plan["budgets"]
    train, dev = (examples_of(state, task, split, plan["examples"], seed) for split in ("train", "dev"))
    middle = sorted(budgets)[len(budgets) // 2]
    searched = search_structure(model, candidates, train, dev, middle, plan["search_steps"], plan["lr"], seed=seed)
    worths = {
        "control": place_by_control(model, candidates, train, middle, seed).authority,
        "even": even_worth(model, candidates),
        "random": random_worth(model, candidates, seed),
        "S3Delta": searched.probabilities,
    }
    return {way: {budget: _spent(state, worth, budget) for budget in budgets} for way, worth in worths.items()}


def _spent(state: State, worth: dict[str, float], budget: int) -> str:
    """Return the delta of a worth; budgets are compared only where each is spent to the last parameter."""
    delta, parameters = place_by_worth(state.backbone.model, parse(state.plan.placement["candidates"]), worth, budget)
    if parameters != budget:
        raise DeltaTuneError(
            f"{parameters:,} parameters of a budget of {budget:,} are spent; write a multiple of 8,192."
        )
    return str(delta)
