"""LoKr against peft's LoKr, and KronA against the paper's formula, with the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import deltatune as dt
from deltatune.methods.reparameterization.krona import KronA
from deltatune.methods.reparameterization.lokr import LoKr
from tests.reference.one_linear import check_peft, inputs, layer, moved


@pytest.mark.parametrize(
    ("d_in", "d_out", "rank", "factor"),
    [(24, 40, 2, -1), (24, 40, 8, -1), (24, 40, 2, 4), (18, 35, 2, 4), (24, 37, 3, 8)],
)
def test_lokr_equals_peft_with_the_same_tensors(d_in, d_out, rank, factor):
    from peft import LoKrConfig

    method = LoKr(rank, alpha=5.0, factor=factor)
    names = {"A": "lokr_w2_b", "B": "lokr_w2_a", "C": "lokr_w1", "D": "lokr_w2"}
    declared = dt.sites(layer(d_in, d_out), method.at("path:only")).placements[0].leaves
    config = LoKrConfig(r=rank, alpha=5.0, decompose_factor=factor, target_modules=["only"])
    check_peft(method, config, {leaf: f"{names[leaf]}.default" for leaf in declared}, d_in, d_out)


def test_lokr_counts_both_factors_and_keeps_a_second_one_that_is_small_whole():
    factored = dt.sites(layer(), LoKr(rank=2).at("path:only"))
    assert factored.parameters == 5 * 4 + 2 * (8 + 6)  # 40 = 5 x 8, 24 = 4 x 6
    assert dt.sites(layer(), LoKr(rank=4).at("path:only")).parameters == 5 * 4 + 8 * 6


@torch.no_grad()
@pytest.mark.parametrize("factor", [-1, 2])
def test_krona_is_the_papers_kronecker_product(factor):
    model, x = layer(), inputs()
    weights, p = moved(KronA(factor, scale=0.5), model, size=0.5)
    a_out, a_in = p["A"].shape
    assert (a_out, a_in) == ((5, 4) if factor == -1 else (2, 2))
    change = torch.zeros(40, 24)
    b_out, b_in = p["B"].shape
    for i in range(40):
        for j in range(24):
            change[i, j] = 0.5 * p["A"][i // b_out, j // b_in] * p["B"][i % b_out, j % b_in]
    torch.testing.assert_close(change, 0.5 * torch.kron(p["A"], p["B"]))
    expected = F.linear(x, model.only.weight + change, model.only.bias)
    merged = dt.merge(model, weights)["only.weight"]
    torch.testing.assert_close(merged, model.only.weight + change, rtol=0, atol=1e-6)
    with dt.attach(model, weights):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    assert weights.count == a_out * a_in + b_out * b_in


def test_a_prime_width_is_one_times_itself():
    table = dt.sites(layer(7, 11), KronA().at("path:only"))
    assert table.tensors["0.only.A"].shape == (1, 1)
    assert table.tensors["0.only.B"].shape == (11, 7)


@pytest.mark.parametrize("method", [LoKr, KronA])
@pytest.mark.parametrize("factor", [0, -2])
def test_a_factor_that_splits_nothing_is_refused(method, factor):
    with pytest.raises(dt.DeltaTuneError, match="-1 for the square root"):
        method(factor=factor)
