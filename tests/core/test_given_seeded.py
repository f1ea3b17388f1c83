"""A seeded leaf that the weights bring themselves holds instead of the regenerated one, wherever weights are used."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import busy, output


@pytest.fixture
def model():
    return tiny.llama()


@pytest.fixture
def pair(model):
    """Weights of one seed, and what another seed regenerates brought along with the same vectors."""
    delta = dt.VeRA(rank=4).at("attn.q")
    weights = busy(dt.init(delta, model, seed=1))
    with dt.attach(model, weights) as attachment:
        drawn = {name: tensor.clone() for name, tensor in attachment.named_tensors() if name not in weights.tensors}
    assert drawn
    return weights, replace(weights, seed=2, fixed=drawn)


@torch.no_grad()
def test_what_is_brought_along_is_what_computes(model, pair, tmp_path):
    weights, brought = pair
    with dt.attach(model, weights):
        expected = output(model)
    with dt.attach(model, replace(weights, seed=2)):
        assert (output(model) - expected).abs().max() > 1e-4
    dt.save(brought, tmp_path)
    others = [brought, dt.Weights.read(tmp_path), dt.flatten(model, brought), dt.combine(model, [brought], [1.0])[0]]
    for other in others:
        with dt.attach(model, other) as attachment:
            assert torch.equal(output(model), expected)
            assert attachment.weights.fixed.keys() == brought.fixed.keys()
        merged = dt.merge(model, other)
        assert all(torch.equal(tensor, merged[name]) for name, tensor in dt.merge(model, weights).items())


@torch.no_grad()
def test_other_weights_put_in_place_bring_their_own_or_their_seed_s(model, pair):
    weights, brought = pair
    with dt.attach(model, weights):
        expected = output(model)
    with dt.attach(model, replace(weights, seed=2)) as attachment:
        attachment.set(brought)
        assert torch.equal(output(model), expected)
        attachment.set(replace(weights, seed=3))
        assert (output(model) - expected).abs().max() > 1e-4
        attachment.set(weights)
        assert torch.equal(output(model), expected)
        assert attachment.weights.seed == weights.seed
        assert not attachment.weights.fixed


def test_what_is_brought_along_has_to_fit(model, pair):
    _, brought = pair
    name = next(iter(brought.fixed))
    for change, words in (
        ({name: torch.ones(2, 2)}, "has the shape"),
        ({"0.*.C_4x32": torch.ones(4, 32)}, "does not declare"),
    ):
        with pytest.raises(dt.DeltaTuneError, match=words):
            dt.attach(model, replace(brought, fixed=change))
