"""(IA)^3 against peft's IA3 with the same tensors: scores, gradients, merged weights."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, by_path, copied, moved, scores

MODULES = {  # what the paper rescales, and which of it at the input
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "bert": (["key", "value", "0.output.dense", "1.output.dense"], ["0.output.dense", "1.output.dense"]),
}


def peft_ia3(name):
    from peft import IA3Config, get_peft_model

    targets, inner = MODULES[name]
    return get_peft_model(BACKBONES[name](), IA3Config(target_modules=targets, feedforward_modules=inner)).eval()


def layers_of(name, model, weights):
    """Return peft's model and {address: its vector}, holding our numbers."""
    theirs = peft_ia3(name)
    vectors = {}
    for address, leaves in by_path(model, weights).items():
        layer = theirs.get_submodule(f"base_model.model.{address.removesuffix(':in')}")
        vectors[address] = layer.ia3_l["default"]
        copied(vectors[address], leaves["l"])
    return theirs, vectors


@pytest.mark.parametrize("name", MODULES)
def test_ia3_equals_peft_with_the_same_tensors(name):
    model, weights = moved(name, dt.IA3())
    theirs, vectors = layers_of(name, model, weights)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == weights.count
    bare = scores(model)
    attachment = dt.attach(model, weights)
    ours, reference = scores(model), scores(theirs)
    assert (ours - bare).abs().max() > 5e-3
    torch.testing.assert_close(ours, reference, **TOLERANCE)
    ours.square().mean().backward()
    reference.square().mean().backward()
    for leaf, parameter in attachment.named_parameters():
        vector = vectors[leaf.removeprefix("0.").removesuffix(".l")]
        torch.testing.assert_close(parameter.grad, vector.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_merged_weights_and_biases_are_those_that_peft_merges():
    model, weights = moved("bert", dt.IA3())
    reference = dict(layers_of("bert", model, weights)[0].merge_and_unload().named_parameters())
    state = dt.merge(model, weights)
    assert {path for path in state if path.endswith("bias")} == {
        f"bert.encoder.layer.{i}.attention.self.{n}.bias" for i in range(2) for n in ("key", "value")
    }
    for path, tensor in state.items():
        torch.testing.assert_close(tensor, reference[path], rtol=0, atol=1e-6)


def test_the_side_of_the_where_says_which_way_it_scales():
    model = tiny.plain()
    table = {
        p.site.address: p.leaves["l"].shape for p in dt.sites(model, dt.IA3().at("path:blocks.0.first")).placements
    }
    assert table == {"blocks.0.first": (48, 1)}
    table = dt.sites(model, dt.IA3().at("path:blocks.0.first:in"))
    assert [p.leaves["l"].shape for p in table.placements] == [(1, 32)]


def test_a_layer_has_two_key_value_widths_and_the_inner_width():
    assert dt.sites(tiny.llama(), dt.IA3()).parameters == 3 * (2 * 16 + 48)
    assert dt.sites(tiny.t5(), dt.IA3()).parameters == 2 * (2 * 32 + 48) + 2 * (
        4 * 32 + 48
    )  # the decoder attends twice
