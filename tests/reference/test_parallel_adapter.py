"""Parallel adapter against y + s (f(x D^T + d) U^T + u), put around whole sub-layers of a copy of the model by forward hooks."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, by_path, moved, scores

FUNCTIONS = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


def beside(leaves, scale, f=torch.relu):
    """Return a hook that adds the paper's adapter of the module's input to its output."""

    def hook(module, args, kwargs, y):
        x = args[0] if args else kwargs["hidden_states"]
        change = (f(x @ leaves["D"].T + leaves["d"]) @ leaves["U"].T + leaves["u"]) * leaves.get("scale", scale)
        return (y[0] + change, *y[1:]) if isinstance(y, tuple) else y + change

    return hook


def check(name, delta, scale, f=torch.relu):
    model, weights = moved(name, delta)
    reference, leaves = BACKBONES[name](), by_path(model, weights)
    for path, own in leaves.items():
        reference.get_submodule(path).register_forward_hook(beside(own, scale, f), with_kwargs=True)
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)
    return leaves


@torch.no_grad()
@pytest.mark.parametrize("activation", list(FUNCTIONS))
def test_parallel_adapters_stand_beside_whole_feed_forwards(activation):
    leaves = check("llama", dt.ParallelAdapter(size=5, activation=activation), 4.0, FUNCTIONS[activation])
    assert list(leaves) == [f"model.layers.{i}.mlp" for i in range(3)]


@torch.no_grad()
@pytest.mark.parametrize(("name", "where"), [("llama", "attn"), ("gpt2", "ffn"), ("t5", "{attn,cross?,ffn}")])
def test_parallel_adapters_stand_beside_attention_too(name, where):
    check(name, dt.ParallelAdapter(size=5, scale=0.5).at(where), 0.5)


@torch.no_grad()
def test_a_scale_that_is_an_initialiser_is_trained():
    leaves = check("llama", dt.ParallelAdapter(size=5, scale=dt.Constant(2.0)), 0.0)
    assert all(own["scale"].shape == (1,) for own in leaves.values())
    start = dt.init(dt.ParallelAdapter(size=5, scale=dt.Constant(2.0)), BACKBONES["llama"]())
    assert {t.item() for n, t in start.tensors.items() if n.endswith("scale")} == {2.0}


@torch.no_grad()
def test_on_bert_the_branch_goes_from_the_first_to_the_second_layer_of_the_feed_forward():
    model, weights = moved("bert", dt.ParallelAdapter(size=5))
    reference, leaves = BACKBONES["bert"](), by_path(model, weights)
    for i, own in enumerate(leaves.values()):
        layer = reference.bert.encoder.layer[i]
        kept = {}
        layer.intermediate.register_forward_hook(lambda m, args, y, kept=kept: kept.update(x=args[0]))
        layer.output.dense.register_forward_hook(
            lambda m, args, y, kept=kept, own=own: (
                y + 4.0 * (torch.relu(kept["x"] @ own["D"].T + own["d"]) @ own["U"].T + own["u"])
            )
        )
    with dt.attach(model, weights):
        torch.testing.assert_close(scores(model), scores(reference), **TOLERANCE)


def test_counts_are_those_of_the_formula():
    model, d = BACKBONES["llama"](), tiny.WIDTH
    assert dt.sites(model, dt.ParallelAdapter(size=5)).parameters == 3 * (5 * 2 * d + 5 + d)
    assert dt.sites(model, dt.ParallelAdapter(size=5, scale=dt.Ones())).parameters == 3 * (5 * 2 * d + 5 + d + 1)
    prefix = dt.sites(model, dt.PrefixTuning(length=3)).parameters
    assert dt.sites(model, dt.mam(length=3, size=5)).parameters == prefix + 3 * (5 * 2 * d + 5 + d)


def test_nonsense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="size=0"):
        dt.ParallelAdapter(size=0)
    with pytest.raises(dt.DeltaTuneError, match="no activation 'rely'.*relu"):
        dt.ParallelAdapter(activation="rely")
