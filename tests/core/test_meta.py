"""An 8B-shape Llama on the meta device: placing, counting and attaching need no value of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltatune as dt

LAYERS, D, FFN, KEYS, RANK = 32, 4096, 14336, 1024, 8  # KEYS: 8 heads of width 128
MLP = 2 * (D + FFN) + (FFN + D)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": D, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "vocab_size": 128256}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, **sizes)).bfloat16()


@pytest.mark.parametrize(
    ("delta", "count"),
    [
        (dt.LoRA(rank=RANK).at("attn.{q,v}"), LAYERS * RANK * ((D + D) + (D + KEYS))),
        (
            dt.LoRA(rank=RANK).at("{attn.{q,k,v,o},ffn.{gate,up,down}}"),
            LAYERS * RANK * (2 * (D + D) + 2 * (D + KEYS) + MLP),
        ),
        (dt.PrefixTuning(length=30), LAYERS * 2 * 30 * KEYS),
    ],
)
def test_attached_leaves_are_as_many_as_the_formula_says(model, delta, count):
    table = dt.sites(model, delta)
    assert table.parameters == count
    assert table.backbone_parameters == 8_030_261_248
    with dt.attach(model, delta) as attachment:
        assert sum(p.numel() for p in attachment.parameters()) == count
        assert {(p.device.type, p.dtype) for p in attachment.parameters()} == {("meta", torch.float32)}
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == table.backbone_parameters


def test_what_needs_values_says_that_there_are_none(model):
    assert dt.sites(model, dt.Full()).parameters == dt.sites(model, dt.Full()).backbone_parameters
    for delta in (dt.Full(), dt.DoRA()):
        with pytest.raises(dt.DeltaTuneError, match="is on the meta device and has no values; load"):
            dt.attach(model, delta)
    assert "deltas" not in model._modules
