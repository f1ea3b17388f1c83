"""LoHa against peft's LoHa with the same tensors: outputs, gradients, merged weight, count."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.methods.reparameterization.loha import LoHa
from tests.reference.one_linear import check_peft, layer


@pytest.mark.parametrize("rank", [1, 3])
def test_loha_equals_peft_with_the_same_tensors(rank):
    from peft import LoHaConfig

    names = {"A1": "hada_w1_b", "B1": "hada_w1_a", "A2": "hada_w2_b", "B2": "hada_w2_a"}
    config = LoHaConfig(r=rank, alpha=5.0, target_modules=["only"])
    check_peft(LoHa(rank, alpha=5.0), config, {leaf: f"{name}.default" for leaf, name in names.items()})


def test_loha_trains_twice_as_many_parameters_as_lora_and_its_change_has_the_squared_rank():
    model = layer()
    weights = dt.init(LoHa(rank=3).at("path:only"), model)
    assert weights.count == 2 * 3 * (24 + 40)
    tensors = {name: torch.randn_like(tensor) for name, tensor in weights.tensors.items()}
    change = dt.merge(model, dt.Weights(**{**vars(weights), "tensors": tensors}))["only.weight"] - model.only.weight
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 9


@pytest.mark.parametrize(("rank", "words"), [(0, "rank=1 or more"), (25, "40 x 24")])
def test_a_rank_that_does_not_fit_is_refused(rank, words):
    with pytest.raises(dt.DeltaTuneError, match=words):
        dt.sites(layer(), LoHa(rank).at("path:only"))
