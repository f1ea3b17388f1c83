"""LN-tuning against peft's LN tuning with the same tensors: scores, gradients, and the count of the norms' parameters."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, by_path, copied, moved, scores

NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "model.norm"],
    "bert": ["embeddings.LayerNorm", "output.LayerNorm"],
}


def peft_ln(name):
    from peft import LNTuningConfig, get_peft_model

    return get_peft_model(BACKBONES[name](), LNTuningConfig(target_modules=NORMS[name])).eval()


@pytest.mark.parametrize("name", NORMS)
def test_ln_tuning_equals_peft_with_the_same_tensors(name):
    model, weights = moved(name, dt.LNTuning())
    theirs = peft_ln(name)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == weights.count
    norms = {}
    for address, leaves in by_path(model, weights).items():
        path, _, tensor = address.rpartition(".")
        norms[address] = (
            theirs.get_submodule(f"base_model.model.{path}").ln_tuning_layers["default"]._parameters[tensor]
        )
        copied(norms[address], leaves["value"])
    bare = scores(model)
    attachment = dt.attach(model, weights)
    ours, reference = scores(model), scores(theirs)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, **TOLERANCE)
    ours.square().mean().backward()
    reference.square().mean().backward()
    for name, leaf in attachment.named_parameters():
        address = name.removeprefix("0.").removesuffix(".value")
        torch.testing.assert_close(leaf.grad, norms[address].grad, rtol=1e-4, atol=1e-6)


def test_a_layer_norm_has_2_d_parameters_and_an_rms_norm_d():
    assert dt.sites(BACKBONES["bert"](), dt.LNTuning()).parameters == 2 * 32 * (1 + 2 * 2)
    assert dt.sites(BACKBONES["llama"](), dt.LNTuning()).parameters == 32 * (2 * 3 + 1)
