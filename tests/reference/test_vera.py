"""VeRA and PVeRA against peft with the same shared matrices: function, parameters, noise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import deltatune as dt
from deltatune.core.site import Site
from tests import tiny
from tests.reference.compare import copied
from tests.reference.single import D_IN, D_OUT, assert_same, inputs, leaves_of, peft_single, started


def put(layer, prefix, leaves):
    """Give peft's layer our tensors."""
    A, B = (next(t for n, t in leaves.items() if n.startswith(f"{side}_")) for side in "AB")
    own = vars(layer)["_modules"]
    copied(own[f"{prefix}_A"]["default"], A)
    copied(own[f"{prefix}_B"]["default"], B)
    copied(own[f"{prefix}_lambda_d"]["default"], leaves["d"])
    copied(own[f"{prefix}_lambda_b"]["default"], leaves["b"])


def test_vera_equals_peft_with_the_same_tensors():
    from peft import VeraConfig

    model, weights = started(dt.VeRA(rank=6))
    layer = peft_single(VeraConfig(r=6, target_modules=["layer"]))
    bound = layer.vera_A["default"].abs().max()
    leaves = leaves_of(model, weights)
    put(layer, "vera", leaves)
    assert_same(model, weights, layer)
    assert weights.count == 6 + D_OUT
    assert abs(leaves[f"A_6x{D_IN}"].abs().max() - bound) < 0.05 * bound  # the same distribution
    fresh = dt.init(weights.delta, model).tensors
    assert (fresh["0.layer.d"] == 0.1).all()
    assert not fresh["0.layer.b"].any()


def test_sites_of_one_width_share_their_matrices_and_the_count_is_peft_s():
    from peft import VeraConfig, get_peft_model

    model = tiny.llama()
    table = dt.sites(model, dt.VeRA(rank=6))
    shared = {name: leaf.shape for name, leaf in table.tensors.items() if leaf.scope == "delta"}
    assert shared == {"0.*.A_6x32": (6, 32), "0.*.B_32x6": (32, 6), "0.*.B_16x6": (16, 6)}
    theirs = get_peft_model(model, VeraConfig(r=6, target_modules=["q_proj", "v_proj"]))
    assert table.parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_pvera_equals_peft_and_its_mean_is_what_is_merged():
    from peft import PveraConfig

    model, weights = started(dt.PVeRA(rank=6))
    layer = peft_single(PveraConfig(r=6, target_modules=["layer"]))
    leaves = leaves_of(model, weights)
    put(layer, "pvera", leaves)
    assert_same(model, weights, layer)
    assert weights.count == 2 * 6 + D_OUT == sum(p.numel() for p in layer.parameters() if p.requires_grad)


@torch.no_grad()
def test_pvera_draws_noise_that_peft_would_draw_as_well():
    from peft import PveraConfig

    method = dt.PVeRA(rank=6)
    model, weights = started(method)
    layer, leaves = peft_single(PveraConfig(r=6, target_modules=["layer"])), leaves_of(model, weights)
    put(layer, "pvera", leaves)
    drawn = method.draw(SimpleNamespace(**leaves), torch.Generator().manual_seed(1))
    assert set(drawn) == {"e"}
    again = method.draw(SimpleNamespace(**leaves), torch.Generator().manual_seed(1))
    assert torch.equal(drawn["e"], again["e"])
    layer._reparametrize = lambda mu, logvar, adapter: mu + drawn["e"] * torch.exp(0.5 * logvar)
    x = inputs()
    ours = method.output(SimpleNamespace(**{**leaves, **drawn}), x, model.layer(x), model.layer)
    torch.testing.assert_close(ours, layer(x), rtol=0, atol=1e-5)
    assert (ours - method.output(SimpleNamespace(**leaves), x, model.layer(x), model.layer)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["VeRA", "PVeRA"])
def test_a_rank_may_exceed_the_widths_but_not_be_nothing(name):
    leaves = dt.parse(name).terms[0].method.leaves(Site("attn.q", "q", d_in=8, d_out=4))
    assert leaves["b"].shape == (4,)
    with pytest.raises(dt.DeltaTuneError, match=r"rank=0\) cannot be built"):
        dt.parse(f"{name}(rank=0)")
