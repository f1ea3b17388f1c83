"""HRA against peft's HRA with the same tensors, and its penalty against the formula."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.core.method import Bag
from deltatune.methods.reparameterization.hra import HRA
from tests.reference.one_linear import check_peft, inputs, layer, moved


@pytest.mark.parametrize("rank", [2, 6])
def test_hra_equals_peft_with_the_same_tensors(rank):
    from peft import HRAConfig

    check_peft(HRA(rank), HRAConfig(r=rank, target_modules=["only"]), {"U": "hra_u.default"})


@torch.no_grad()
def test_a_fresh_hra_is_neutral_because_its_reflections_cancel_in_pairs():
    model, x = layer(), inputs()
    before = model(x)
    with dt.attach(model, HRA(rank=8).at("path:only")):
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_penalty_is_the_distance_of_the_unit_columns_from_orthogonal_ones():
    method = HRA(rank=4, order=0.5)
    _, p = moved(method, layer(), size=1.0)
    expected = 0.0
    for i in range(4):
        for j in range(4):
            u, v = p["U"][:, i], p["U"][:, j]
            expected += 0.5 * (float(i == j) - float(u @ v / (u.norm() * v.norm()))) ** 2
    assert float(method.penalty(Bag(p))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("rank", "words"), [(3, "even rank"), (0, "rank=2 or more"), (26, "width 24")])
def test_a_rank_that_does_not_fit_is_refused(rank, words):
    with pytest.raises(dt.DeltaTuneError, match=words):
        dt.sites(layer(), HRA(rank).at("path:only"))
