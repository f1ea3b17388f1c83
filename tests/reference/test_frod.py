"""FRoD against peft with the same basis: function, parameters, errors."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.methods._joint import joint
from tests import tiny
from tests.reference.compare import copied
from tests.reference.single import assert_same, leaves_of, peft_single, single, started


@pytest.mark.parametrize("shape", [(24, 20), (20, 24)])
def test_frod_equals_peft_with_the_same_basis_and_places(shape):
    from peft import FrodConfig

    d_in, size = shape[0], {"d_in": shape[0], "d_out": shape[1]}
    model, weights = started(dt.FRoD(share=0.05), **size)
    config = FrodConfig(sparse_rate=0.05, target_modules=["layer"], progressbar=False)
    layer, leaves = peft_single(config, **size), leaves_of(model, weights)
    count = int(d_in * d_in * 0.05)
    V, places = leaves[f"V_{d_in}x{d_in}"], leaves[f"j_{d_in}"]
    scale = torch.linalg.solve(V, model.layer.weight.detach().T).norm(dim=1)
    rows, columns = places // d_in, places % d_in
    assert len(places.unique()) == count
    assert not (rows == columns).any()
    U, L = layer._calculate_frod_u_and_lambda(V, model.layer.weight)
    torch.testing.assert_close(L, scale, rtol=0, atol=1e-4)
    layer.frod_V["default"], layer.frod_U["default"] = V, U
    layer.frod_s_indices["default"] = torch.stack([rows, columns])
    copied(layer.frod_lambda_l["default"], leaves["l"] * L)
    copied(layer.frod_lambda_s_values["default"], leaves["S"] * L[rows])
    assert_same(model, weights, layer, tolerance=1e-4)
    assert weights.count == d_in + count == sum(p.numel() for p in layer.parameters() if p.requires_grad)


def test_sites_of_one_width_share_the_basis_that_peft_finds_for_them():
    from peft import FrodConfig, get_peft_model

    weights = dt.init(dt.FRoD().at("attn.q"), tiny.llama())
    V, R = weights.fixed["0.*.V_32x32"], weights.fixed["0.*.R_32x32"]
    assert len(weights.fixed) == 2
    torch.testing.assert_close(R.T @ V, torch.eye(32), rtol=0, atol=1e-4)
    theirs = get_peft_model(tiny.llama(), FrodConfig(target_modules=["q_proj"], progressbar=False))
    torch.testing.assert_close(V, theirs.base_model.frod_V["self_attn_q_proj"]["default"], rtol=0, atol=1e-5)
    assert weights.count == 3 * (32 + 10)


def test_a_basis_of_weights_without_full_rank_is_orthogonal():
    W = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    for few in (W[:5], torch.cat([W[:, :4], W[:, :4]], 1), torch.zeros(9, 8)):
        V, R = joint([few, few])
        assert V is R
        torch.testing.assert_close(V.T @ V, torch.eye(8), rtol=0, atol=1e-5)


def test_what_is_not_a_share_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="write a number between 0 and 1, such as 0.01"):
        dt.FRoD(share=1.5)
    with pytest.raises(dt.DeltaTuneError, match="is not a share"):
        dt.FRoD(share=0.0)
    assert dt.sites(single(), dt.FRoD(share=1.0).at("path:layer")).parameters == 24 * 24
    assert dt.sites(single(), dt.FRoD(share=1e-6).at("path:layer")).parameters == 24 + 1
