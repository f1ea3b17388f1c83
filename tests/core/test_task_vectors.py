"""Merges of changes, against the papers' definitions in plain loops."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

import deltatune as dt
from deltatune.core.task_vectors import dare, magnitude_prune, ties
from tests import tiny
from tests.core.dense import BOTH, dense, error_of, made, moved, same, total


@pytest.fixture(scope="module")
def model():
    return tiny.plain()


def kept_by_size(change, density):
    flat = np.abs(change).ravel()
    order = sorted(range(len(flat)), key=lambda i: -flat[i])[: max(1, round(density * len(flat)))]
    out = np.zeros(len(flat))
    for i in order:
        out[i] = change.ravel()[i]
    return out.reshape(change.shape)


def some(model):
    return [made(model, m, seed=i, where=BOTH) for i, m in enumerate((dt.LoRA(rank=4), dt.HRA(rank=4), dt.IA3()))]


def test_magnitude_pruning_keeps_the_largest_entries(model):
    each, coefficients = some(model), [1.0, -0.5, 2.0]
    parts = [{n: kept_by_size(change, 0.3) for n, change in dense(model, w).items()} for w in each]
    result, report = magnitude_prune(model, each, coefficients, 0.3)
    same(moved(dense(model, result)), moved(total(parts, coefficients)), rtol=1e-5)
    assert report.error < 1e-5
    one, _ = magnitude_prune(model, each[:1], [1.0], 0.3)
    assert np.count_nonzero(dense(model, one)["blocks.0.first.weight"]) == round(0.3 * tiny.FFN * tiny.WIDTH)


def test_ties_is_the_papers_merge(model):
    each, coefficients = some(model), [1.0, 0.5, 2.0]
    parts = [{n: kept_by_size(change, 0.4) for n, change in dense(model, w).items()} for w in each]
    wanted = {}
    for name in {n for part in parts for n in part}:
        given = [c * part[name].ravel() for c, part in zip(coefficients, parts, strict=True) if name in part]
        out = []
        for entries in zip(*given, strict=True):
            elected = 1 if sum(entries) > 0 else -1
            agree = [e for e in entries if e * elected > 0]
            out.append(sum(agree) / len(agree) if agree else 0.0)
        wanted[name] = np.array(out).reshape(next(p[name] for p in parts if name in p).shape)
    result, report = ties(model, each, coefficients, 0.4)
    same(moved(dense(model, result)), moved(wanted), rtol=1e-5)
    assert report.error < 1e-5
    low, _ = ties(model, each, coefficients, 0.4, rank=24, tolerance=0.5)
    assert error_of(dense(model, low), moved(wanted)) < 0.5


def test_ties_of_one_delta_with_all_entries_is_that_delta(model):
    weights = made(model, dt.LoRA(rank=2))
    for compute in (ties, dare, magnitude_prune):
        same(moved(dense(model, compute(model, [weights], [0.5], 1.0)[0])), total([dense(model, weights)], [0.5]))


def test_dare_drops_by_chance_and_rescales(model):
    each, coefficients = some(model)[:2], [1.0, -0.5]
    wanted = {}
    for i, (c, weights) in enumerate(zip(coefficients, each, strict=True)):
        for name, change in dense(model, weights).items():
            seed = int.from_bytes(hashlib.sha256(f"3|{i}|{name}".encode()).digest()[:7], "big")
            chance = torch.rand(change.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            mask = (chance < 0.25).numpy()
            assert abs(mask.mean() - 0.25) < 0.05
            wanted[name] = wanted.get(name, 0) + c * change * mask / 0.25
    result, report = dare(model, each, coefficients, 0.25, seed=3)
    same(moved(dense(model, result)), wanted, rtol=1e-5)
    assert report.error < 1e-5
    again, other = (dare(model, each, coefficients, 0.25, seed=s)[0] for s in (3, 4))
    name = "0.blocks.0.first.weight.value"
    assert torch.equal(again.tensors[name], result.tensors[name])
    assert not torch.equal(other.tensors[name], result.tensors[name])


def test_dare_keeps_the_mean(model):
    weights = made(model, dt.LoRA(rank=2), where="path:blocks.0.first")
    draws = [dense(model, dare(model, [weights], [1.0], 0.5, seed=s)[0])["blocks.0.first.weight"] for s in range(30)]
    change = dense(model, weights)["blocks.0.first.weight"]
    assert np.linalg.norm(np.mean(draws, 0) - change) < 0.3 * np.linalg.norm(change)  # 1 / sqrt(30) is 0.18
