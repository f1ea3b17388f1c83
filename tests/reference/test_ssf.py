"""SSF against y' = g y + s, put behind every linear layer of a copy of the model."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, by_path, moved, scores


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_feature_is_scaled_and_shifted(name):
    model, weights = moved(name, dt.SSF())
    reference = BACKBONES[name]()
    for path, leaves in by_path(model, weights).items():
        reference.get_submodule(path).register_forward_hook(lambda m, args, y, p=leaves: p["g"] * y + p["s"])
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)


@torch.no_grad()
def test_a_layer_without_a_bias_gets_one_when_merged():
    model, weights = moved("llama", dt.SSF().at("attn.q[0]"))
    state, leaves = dt.merge(model, weights), by_path(model, weights)["model.layers.0.self_attn.q_proj"]
    W = model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(state["model.layers.0.self_attn.q_proj.weight"], leaves["g"][:, None] * W)
    torch.testing.assert_close(state["model.layers.0.self_attn.q_proj.bias"], leaves["s"])


def test_it_trains_two_numbers_a_feature():
    assert dt.sites(tiny.bert(), dt.SSF()).parameters == 2 * 2 * (5 * 32 + 48)
