"""LoRA-FA, LoRA-XS and TinyLoRA against peft (LoRA and TinyLoRA) and the papers' formulas: function, parameters, errors."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests.reference.compare import copied
from tests.reference.single import D_IN, D_OUT, PLACE, assert_same, leaves_of, peft_single, single, started


def test_lora_fa_is_peft_s_lora_with_an_a_that_stays():
    from peft import LoraConfig

    model, weights = started(dt.LoRAFA(rank=3, alpha=6.0))
    layer, leaves = peft_single(LoraConfig(r=3, lora_alpha=6, target_modules=["layer"])), leaves_of(model, weights)
    copied(layer.lora_A["default"].weight, leaves["A"])
    copied(layer.lora_B["default"].weight, leaves["B"])
    assert_same(model, weights, layer)
    assert weights.count == 3 * D_OUT
    assert not weights.fixed  # A comes back from the seed
    with dt.attach(model, weights) as attachment:
        assert [name for name, _ in attachment.named_parameters()] == ["0.layer.B"]


@torch.no_grad()
def test_lora_xs_turns_the_principal_part_of_the_weight():
    model, weights = started(dt.LoRAXS(rank=4))
    W, R = model.layer.weight, weights.tensors["0.layer.R"]
    U, S, Vt = torch.linalg.svd(W)
    expected = W.clone()
    for i in range(4):
        for j in range(4):
            expected += S[i] * R[i, j] * torch.outer(U[:, i], Vt[j])
    torch.testing.assert_close(dt.merge(model, weights)["layer.weight"], expected, rtol=0, atol=1e-5)
    assert weights.count == 16
    assert {n: tuple(t.shape) for n, t in weights.fixed.items()} == {
        "0.layer.A": (4, D_IN),
        "0.layer.B": (D_OUT, 4),
    }
    with dt.attach(model, weights):
        x = torch.randn(3, D_IN)
        torch.testing.assert_close(model(x), x @ expected.T + model.layer.bias, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tiny_lora_equals_peft_with_the_same_projections():
    from peft import TinyLoraConfig

    model, weights = started(dt.TinyLoRA(rank=2, size=13))
    layer, leaves = peft_single(TinyLoraConfig(r=2, u=13, target_modules=["layer"])), leaves_of(model, weights)
    torch.testing.assert_close(leaves["A"].abs(), layer.tinylora_A["default"].abs(), rtol=0, atol=1e-5)
    torch.testing.assert_close(leaves["B"].abs(), layer.tinylora_B["default"].abs(), rtol=0, atol=1e-5)
    for name in "ABP":
        copied(vars(layer)["_modules"][f"tinylora_{name}"]["default"], leaves[name])
    copied(layer.tinylora_v["default"]["0"], leaves["v"])
    assert_same(model, weights, layer)
    assert weights.count == 13
    assert abs(leaves["P"].std() - 2**-0.5) < 0.15


def test_tiny_lora_can_train_one_vector_for_all_sites():
    from tests import tiny

    assert dt.sites(tiny.llama(), dt.TinyLoRA(size=13)).parameters == 3 * 7 * 13
    assert dt.sites(tiny.llama(), dt.TinyLoRA(size=13, share="delta")).parameters == 13


@pytest.mark.parametrize("method", [dt.LoRAFA(rank=21), dt.LoRAXS(rank=21), dt.TinyLoRA(rank=21)])
def test_a_rank_that_does_not_fit_is_refused(method):
    with pytest.raises(dt.DeltaTuneError, match=r"rank=21\) exceeds the dimensions of 'layer': 20 x 24"):
        dt.sites(single(), method.at(PLACE))


@pytest.mark.parametrize("written", ["LoRAFA(rank=0)", "LoRAXS(rank=0)", "TinyLoRA(size=0)"])
def test_nothing_to_train_is_refused(written):
    with pytest.raises(dt.DeltaTuneError, match=r"=0\) cannot be built"):
        dt.parse(written)
