"""Linear CKA: its invariances, the closed formula through centred kernels, and hidden states with deltas in them."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.theory.similarity import Moments, compare_states
from deltatune.theory.watch import watching
from tests import tiny
from tests.theory.planted import batches, busy, numbers


def cka(X, Y, parts=1):
    moments = Moments()
    for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
        moments.add(x, y)
    return moments.cka()


def test_an_orthogonal_transform_a_scale_and_a_shift_change_nothing():
    X = numbers(50, 8)
    Q = torch.linalg.qr(numbers(8, 8, seed=1))[0]
    assert cka(X, 3 * X @ Q + 5) == pytest.approx(1.0, abs=1e-12)
    assert cka(X, X @ torch.diag(torch.arange(8).double())) < 0.99


@pytest.mark.parametrize("parts", [1, 4])
def test_it_is_the_closed_formula_however_it_is_batched(parts):
    X, Y = numbers(40, 6), numbers(40, 6) @ numbers(6, 9, seed=2) + numbers(40, 9, seed=3)
    H = torch.eye(40, dtype=torch.float64) - 1 / 40
    K, L = H @ X @ X.mT @ H, H @ Y @ Y.mT @ H
    expected = (K * L).sum() / (K.norm() * L.norm())
    assert cka(X, Y, parts) == pytest.approx(float(expected), rel=1e-10)


def test_what_does_not_vary_is_like_nothing():
    assert cka(torch.ones(5, 3), numbers(5, 3)) == 0.0


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_is_like_itself_at_every_block(name):
    model = tiny.FAMILIES[name]()
    found = compare_states(model, None, None, batches(model))
    assert len(found.cka) == {"llama": 3, "t5": 4}[name]
    assert all(value == pytest.approx(1.0) for value in found.cka.values())
    assert found.tokens == {"llama": 30, "t5": 24}[name] and "few for states of width 32" in found.finding


def test_a_delta_shows_from_its_layer_on():
    model = tiny.llama()
    found = compare_states(model, None, busy(dt.Adapter(size=4).at("ffn.down[1]"), model, 1.0), batches(model))
    first, *others = found.cka.values()
    assert first == pytest.approx(1.0) and all(value < 0.999 for value in others)
    assert min(found.cka, key=found.cka.get) in found.finding


def test_a_watch_sees_what_a_delta_does_at_the_very_place_and_leaves_no_trace():
    model = tiny.llama()
    weights, batch = busy(dt.Adapter(size=4).at("block[-1]:out"), model, 1.0), batches(model)[0]
    seen, kind = {}, type(model.model.layers[-1])
    for side in ("bare", "tuned"):
        with dt.attach(model, weights if side == "tuned" else dt.Delta()), watching(model, "block[-1]") as states:
            model(**batch)
            ((_, seen[side]),) = states.values()
    assert not torch.equal(seen["bare"], seen["tuned"])
    assert type(model.model.layers[-1]) is kind and "deltas" not in model._modules
    with watching(model, "{block[1]:in,block[0]:out}") as states:
        with watching(model, "block[0]") as inner:
            model(**batch)
        assert torch.equal(inner["model.layers.0"][1], states["model.layers.0"][1])
        model(**batch)
        (_, a), (_, b) = states.values()
        assert torch.equal(a, b)


def test_models_of_other_widths_compare():
    model = tiny.llama()
    small = tiny.seeded(lambda: type(model)(type(model.config)(**{**model.config.to_dict(), "hidden_size": 16})))
    assert all(0 < value < 1 for value in compare_states(model, None, small, batches(model)).cka.values())


def test_what_cannot_be_compared_is_refused():
    model = tiny.llama()
    with pytest.raises(dt.DeltaTuneError, match="only one of the two models has"):
        compare_states(
            model, None, tiny.gpt2(), [{k: v for k, v in b.items() if k != "labels"} for b in batches(model)]
        )
    with pytest.raises(dt.DeltaTuneError, match="no single module"):
        compare_states(tiny.opt(), None, None, batches(tiny.opt()), "ffn")
