"""Changes of weights in full, the ground of the tests of arithmetic and conversion."""

from __future__ import annotations

import copy

import numpy as np

import deltatune as dt
from tests.laws.cases import busy, fresh

FIRST, BOTH = "path:blocks.*.first", "path:blocks.*.{first,second}"


def made(model, method, seed=0, where=BOTH, start=0):
    return busy(fresh(method.at(where), model, start), seed)


def dense(model, weights):
    """The changes in float64 as numpy arrays, by the road of merging a float64 copy of the whole model."""
    exact = copy.deepcopy(model).double()
    before = {name: p.detach() for name, p in exact.named_parameters(remove_duplicate=False)}
    merged = dt.merge(exact, weights, untie=True)
    return {name: (new.detach() - before[name]).numpy() for name, new in merged.items()}


def same(got, wanted, rtol=1e-6):
    assert got.keys() == wanted.keys()
    for name, change in wanted.items():
        assert np.linalg.norm(got[name] - change) <= rtol * np.linalg.norm(change) + 1e-12, name


def total(parts, coefficients):
    names = {name for part in parts for name in part}
    return {n: sum(c * part[n] for c, part in zip(coefficients, parts, strict=True) if n in part) for n in names}


def moved(changes):
    return {name: change for name, change in changes.items() if np.any(change)}


def error_of(got, wanted):
    return max(np.linalg.norm(got[n] - w) / np.linalg.norm(w) for n, w in wanted.items())
