"""What the finished runs and measurements say, as compact values: the content of `results.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import log10
from statistics import fmean, stdev
from typing import Any

from deltatune.files import read_json
from deltatune.theory.intrinsic import IntrinsicDimension
from deltatune.tuning import Run
from studies.theory.costs import INSTRUMENTS
from studies.theory.state import State

Rows = list[dict[str, Any]]
LEAST = ("violation", "slope", "energy", "share", "hamiltonian")
ENOUGH = 0.99  # of the best rank's dev score


def spread(values: Iterable[float]) -> list[float]:
    """Return mean, standard deviation and number, to four digits."""
    found = list(values)
    return [short(fmean(found)), short(stdev(found)) if len(found) > 1 else 0.0, len(found)]


def short(value: float) -> float:
    """Return a number to four digits."""
    return float(f"{value:.4g}")


def result(state: State, run: Run) -> dict[str, Any] | None:
    """Return the result of a finished run."""
    return read_json(state.runs / run.id / "result.json") if state.has(run) else None


def by_seed(state: State, run: Callable[[int], Run]) -> list[dict[str, Any]]:
    """Return the results of all seeds that are finished."""
    return [found for seed in state.plan.seeds if (found := result(state, run(seed))) is not None]


def scored(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores of one delta over seeds."""
    found = {split: [r[split] for r in results if r[split] is not None] for split in ("dev", "test")}
    return {split: spread(own) for split, own in found.items() if own}


def runs(state: State) -> Rows:
    """Return the scores of every method on every task."""
    rows = []
    for task in state.plan.tasks:
        for method, choice in state.methods().items():
            found = by_seed(state, lambda seed, c=choice, t=task: state.plan.run(c, t, seed))
            if found:
                last = found[-1]
                rows.append(
                    {"task": task, "method": method, "delta": choice.delta, "lr": choice.lr, "metric": last["metric"]}
                    | {"parameters": last["parameters"], "majority": last["majority"], **scored(found)}
                    | {"loss": spread(r["train_loss"] for r in found)}
                )
    return rows


def search(state: State) -> Rows:
    """Return what the search tried."""
    tried = ((name, choice, result(state, run)) for name, own in state.plan.searched().items() for choice, run in own)
    return [{"for": n, "delta": c.delta, "lr": c.lr, "dev": found["dev"]} for n, c, found in tried if found]


def intrinsic(state: State) -> Rows:
    """Return SAID's sweep of every task: d_90 from the dimensions that all seeds have finished, and all scores."""
    searched = state.plan.searched()
    if not all(state.has(run) for at in state.plan.intrinsic["at"] for _, run in searched[f"SAID {at}"]):
        return []
    rows, dims = [], state.plan.intrinsic["dims"]
    for task in state.plan.tasks:
        known = {seed: _swept(state, task, seed) for seed in state.plan.seeds}
        seeds = tuple(seed for seed, own in known.items() if len(own) > 1)
        common = tuple(d for d in dims if all(d in known[seed] for seed in seeds))
        if seeds:
            full = tuple((result(state, state.plan.full(task, seed)) or {})["dev"] for seed in seeds)
            scores = tuple(tuple(known[seed][d] for d in common) for seed in seeds)
            found = IntrinsicDimension(common, seeds, scores, full)
            half = replace(found, share=0.5)
            rows.append(
                {"task": task, "seeds": seeds, "scores": known, "full": full, "dims": common}
                | {"d_90": found.dimension, "interval": found.interval, "finding": found.finding}
                | {"d_50": half.by_seed, "half": half.finding}
            )
    return rows


def _swept(state: State, task: str, seed: int) -> dict[int, float]:
    """Return the dev scores of SAID by dimension, of those that are finished."""
    runs = state.plan.swept(task, seed, state.rates())
    results = zip(state.plan.intrinsic["dims"], (result(state, run) for run in runs), strict=True)
    return {d: found["dev"] for d, found in results if found}


def measured(state: State, name: str) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield method, task and the measurements of all seeds."""
    known = state.known(f"{name}-")
    for task in state.plan.tasks:
        for method in state.methods():
            found = [known[key] for seed in state.plan.seeds if (key := f"{method}-{task}-{seed}") in known]
            if found:
                yield method, task, found


def spectrum(state: State) -> Rows:
    """Return effective ranks by site, means over seeds, and the sizes that they call for."""
    rows = []
    for method, task, found in measured(state, "spectrum"):
        sites = [
            [*first[:3], *(short(fmean(one[place] for one in same)) for place in (3, 4, 5))]
            for same in zip(*(f["sites"] for f in found), strict=True)
            for first in same[:1]
        ]
        rows.append({"task": task, "method": method, "sites": sites, "size": [f["size"] for f in found]})
    return rows


def residual(state: State) -> Rows:
    """Return the share of Full's squared change that each family leaves."""
    rows = []
    for _, task, found in measured(state, "residual"):
        shares: dict[str, list[float]] = {}
        for family in (family for own in found for family in own):
            shares.setdefault(family["family"], []).append((family["norm"] / family["total"]) ** 2)
        rows.append({"task": task, "left": {family: spread(own) for family, own in shares.items()}})
    return rows


def control(state: State) -> Rows:
    """Return what the control instruments say of each step, means over seeds, before and after training."""
    rows = []
    for method, task, found in measured(state, "control"):
        for side in ("before", "after"):
            own = [one[side] for one in found]
            rows.append(
                {"task": task, "method": method, "side": side, "loss": spread(one["loss"] for one in own)}
                | {"violation": spread(one["violation"] for one in own)}
                | {"steps": [_step(same) for same in zip(*(one["steps"] for one in own), strict=True)]}
                | {"reach": [_reach(same) for same in zip(*(one["reach"] for one in own), strict=True)]}
            )
    return rows


def _step(same: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    known = {name: [one[name] for one in same if one[name] is not None] for name in LEAST}
    return {"name": same[0]["name"], **{name: short(fmean(own)) for name, own in known.items() if own}}


def _reach(same: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    """Return a step's reach; traces differ by orders of magnitude, so their geometric mean is taken."""
    names = ("trace", "per_parameter")
    means = {n: short(10 ** fmean(log10(max(one[n], 1e-30)) for one in same)) for n in names}
    spectrum = [short(fmean(own)) for own in zip(*(one["spectrum"] for one in same), strict=True)]
    return {"name": same[0]["name"], "parameters": same[0]["parameters"], **means, "spectrum": spectrum}


def function(state: State) -> Rows:
    """Return how far each method's model is from Full's, and Full's from the bare backbone."""
    rows = []
    for method, task, found in measured(state, "function"):
        cka = {place: short(fmean(one["cka"][place] for one in found)) for place in found[0]["cka"]}
        row = {"task": task, "method": method, "cka": cka} | {
            name: spread(one[name] for one in found) for name in ("kl", "agreement")
        }
        rows.append(row | ({"bound": found[0]["bound"]} if "bound" in found[0] else {}))
    return rows


def sharpness(state: State) -> Rows:
    """Return the largest Hessian eigenvalues."""
    return [{"method": m, "task": task, **found[0]} for m, task, found in measured(state, "sharpness")]


def placement(state: State) -> Rows:
    """Return the scores of every way to place under every budget, of the seeds of which all are finished."""
    rows, known = [], state.known("placed-")
    for task in state.plan.tasks:
        begun = {seed: own for seed in state.plan.seeds if (own := known.get(f"{task}-{seed}"))}
        texts = {s: own for s, own in begun.items() if all(state.has(state.plan.placed(t, task, s)) for t in _all(own))}
        for way, budget in (
            (w, b) for w in ("control", "S3Delta", "even", "random") for b in state.plan.placement["budgets"]
        ):
            own = (result(state, state.plan.placed(t[way][str(budget)], task, seed)) for seed, t in texts.items())
            found = [one for one in own if one is not None]
            if found:
                rows.append({"task": task, "way": way, "budget": budget, **scored(found)})
    return rows


def _all(texts: Mapping[str, Mapping[str, str]]) -> list[str]:
    return [text for own in texts.values() for text in own.values()]


def size(state: State) -> Rows:
    """Return LoRA's dev score by rank, the least rank that is as good as the best, and the rank that spectra call for."""
    rows, spectra = [], {(row["task"], row["method"]): row["size"] for row in spectrum(state)}
    for task in state.plan.tasks:
        seeds = [s for s in state.plan.seeds if all(map(state.has, state.plan.ranks(task, s).values()))]
        if not seeds:
            continue
        sweeps = [{r: (result(state, run) or {})["dev"] for r, run in state.plan.ranks(task, s).items()} for s in seeds]
        least = [next(r for r, dev in own.items() if dev >= ENOUGH * max(own.values())) for own in sweeps]
        estimates = {m: [own["qv"]["rank"] for own in spectra.get((task, m), [])] for m in ("Full", "LoRA")}
        dev = {rank: spread(own[rank] for own in sweeps) for rank in sweeps[0]}
        rows.append({"task": task, "seeds": seeds, "dev": dev, "least": least, "estimates": estimates})
    return rows


def robust(state: State) -> Rows:
    """Return accuracy on clean and on mistyped texts."""
    rows, known = [], state.known("robust-")
    for task in state.plan.robust["tasks"]:
        found = [own for seed in state.plan.seeds if (own := known.get(f"{task}-{seed}"))]
        for way in ("LoRA", "PrefixTuning", "closed loop") if found else ():
            scores = {kind: spread(own[way][kind] for own in found) for kind in ("clean", "attacked")}
            rows.append({"task": task, "way": way, **scores})
    return rows


def costs(state: State) -> Rows:
    """Return seconds and memory of every instrument."""
    known = {row["name"]: row for row in state.known("cost-").values()}
    return [known[name] for name in INSTRUMENTS if name in known]


TABLES: dict[str, Callable[[State], Rows]] = {
    "runs": runs, "search": search, "intrinsic": intrinsic, "spectrum": spectrum, "residual": residual, "control": control,
    "function": function, "sharpness": sharpness, "placement": placement, "size": size, "robust": robust, "costs": costs,
}  # fmt: skip
