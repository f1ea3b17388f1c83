"""LoRA against peft's LoRA with the same tensors: logits and gradients."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, by_path, copied, moved, scores

TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "bert": ["query", "value"],
    "gpt2": ["attn.c_proj", "c_fc"],
}
PLACES = {"gpt2": "{attn.o,ffn.up}"}


def peft_lora(name, **config):
    from peft import LoraConfig, get_peft_model

    fan = {"fan_in_fan_out": True} if name == "gpt2" else {}
    model = get_peft_model(BACKBONES[name](), LoraConfig(lora_dropout=0.0, **config, **fan))
    return model.eval()


@pytest.mark.parametrize("name", TARGETS)
def test_lora_equals_peft_with_the_same_tensors(name):
    delta = dt.LoRA(rank=3, alpha=7.0).at(PLACES.get(name, dt.LoRA.where))
    model, weights = moved(name, delta)
    theirs = peft_lora(name, r=3, lora_alpha=7.0, target_modules=TARGETS[name])
    layers = {path: theirs.get_submodule(f"base_model.model.{path}") for path in by_path(model, weights)}
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == weights.count
    for path, leaves in by_path(model, weights).items():
        copied(layers[path].lora_A["default"].weight, leaves["A"])
        copied(layers[path].lora_B["default"].weight, leaves["B"])
    bare = scores(model)
    attachment = dt.attach(model, weights)
    ours, reference = scores(model), scores(theirs)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, **TOLERANCE)
    ours.square().mean().backward()
    reference.square().mean().backward()
    gradients = {n: p.grad for n, p in attachment.named_parameters()}
    for path, layer in layers.items():
        torch.testing.assert_close(gradients[f"0.{path}.A"], layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradients[f"0.{path}.B"], layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_lora_on_two_roles_of_a_packed_module_is_one_block_diagonal_lora_of_peft():
    rank, width = 3, 32
    model, weights = moved("gpt2", dt.LoRA(rank=rank, alpha=6.0).at("attn.{q,v}"))
    theirs = peft_lora("gpt2", r=2 * rank, lora_alpha=12.0, target_modules=["c_attn"])
    for layer in range(2):
        path = f"transformer.h.{layer}.attn.c_attn"
        q, v = (by_path(model, weights)[f"{path}[{role}]"] for role in "qv")
        joint = torch.zeros(3 * width, 2 * rank)
        joint[:width, :rank], joint[2 * width :, rank:] = q["B"], v["B"]
        packed = theirs.get_submodule(f"base_model.model.{path}")
        copied(packed.lora_A["default"].weight, torch.cat([q["A"], v["A"]]))
        copied(packed.lora_B["default"].weight, joint)
    with dt.attach(model, weights):
        torch.testing.assert_close(scores(model), scores(theirs), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_merged_weights_are_those_that_peft_merges(name):
    delta = dt.LoRA(rank=3, alpha=7.0).at(PLACES.get(name, dt.LoRA.where))
    model, weights = moved(name, delta)
    theirs = peft_lora(name, r=3, lora_alpha=7.0, target_modules=TARGETS[name])
    for path, leaves in by_path(model, weights).items():
        layer = theirs.get_submodule(f"base_model.model.{path}")
        copied(layer.lora_A["default"].weight, leaves["A"])
        copied(layer.lora_B["default"].weight, leaves["B"])
    reference = dict(theirs.merge_and_unload().named_parameters())
    state = dt.merge(model, weights)
    assert set(state) == {f"{path}.weight" for path in by_path(model, weights)}
    for path, tensor in state.items():
        torch.testing.assert_close(tensor, reference[path], rtol=0, atol=1e-6)
