"""DoRA against peft's LoRA with `use_dora`: function, gradients, parameters."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, by_path, copied, moved, scores
from tests.reference.single import single


def test_dora_equals_peft_with_the_same_tensors_and_gradients():
    from peft import LoraConfig, get_peft_model

    model, weights = moved("llama", dt.DoRA(rank=3, alpha=7.0), size=0.1)
    config = LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=["q_proj", "v_proj"])
    theirs = get_peft_model(BACKBONES["llama"](), config).eval()
    layers = {path: theirs.get_submodule(f"base_model.model.{path}") for path in by_path(model, weights)}
    assert weights.count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    magnitudes = {path: layer.lora_magnitude_vector["default"].weight for path, layer in layers.items()}
    fresh = by_path(model, dt.init(weights.delta, model))
    for path, leaves in by_path(model, weights).items():
        torch.testing.assert_close(fresh[path]["m"], magnitudes[path].detach(), rtol=0, atol=1e-6)
        copied(layers[path].lora_A["default"].weight, leaves["A"])
        copied(layers[path].lora_B["default"].weight, leaves["B"])
        copied(magnitudes[path], leaves["m"])
    bare = scores(model)
    attachment = dt.attach(model, weights)
    ours, reference = scores(model), scores(theirs)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, **TOLERANCE)
    ours.square().mean().backward()
    reference.square().mean().backward()
    gradients = {n: p.grad for n, p in attachment.named_parameters()}
    for path, layer in layers.items():
        pairs = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight, "m": magnitudes[path]}
        for leaf, tensor in pairs.items():
            torch.testing.assert_close(gradients[f"0.{path}.{leaf}"], tensor.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_rows_of_the_new_weight_have_the_magnitudes_that_are_trained():
    model = single()
    weights = dt.init(dt.DoRA(rank=2).at("path:layer"), model)
    for tensor in weights.tensors.values():
        tensor.add_(0.3)
    W = dt.merge(model, weights)["layer.weight"]
    torch.testing.assert_close(W.norm(dim=1), weights.tensors["0.layer.m"], rtol=0, atol=1e-5)


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(dt.DeltaTuneError, match=r"DoRA\(rank=21\) exceeds the dimensions of 'layer': 20 x 24"):
        dt.sites(single(), dt.DoRA(rank=21).at("path:layer"))
    with pytest.raises(dt.DeltaTuneError, match=r"DoRA\(rank=0\)"):
        dt.DoRA(rank=0)
