"""HiRA, DeLoRA, PSOFT, GLoRA, DEFT, Lily and BEFT against peft's with the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import deltatune as dt
from deltatune.core.method import Bag
from deltatune.methods.reparameterization.deft import DEFT
from deltatune.methods.reparameterization.delora import DeLoRA
from deltatune.methods.reparameterization.glora import GLoRA
from deltatune.methods.reparameterization.hira import HiRA
from deltatune.methods.reparameterization.lily import Lily
from deltatune.methods.reparameterization.psoft import PSOFT
from tests.reference.one_linear import check_peft, inputs, layer, moved, wrapped


def named(prefix, *leaves):
    return {leaf: f"{prefix}_{leaf}.default" for leaf in leaves}


def test_hira_equals_peft_with_the_same_tensors():
    from peft import HiraConfig

    check_peft(HiRA(3), HiraConfig(r=3, target_modules=["only"]), named("hira", "A", "B"))


def test_delora_equals_peft_with_the_same_tensors():
    from peft import DeloraConfig

    targets = {"strength": "delora_lambda.default", "norms": "delora_w_norm.default", **named("delora", "A", "B")}
    check_peft(DeLoRA(3, strength=4.0), DeloraConfig(r=3, delora_lambda=4, target_modules=["only"]), targets)


@torch.no_grad()
def test_delora_starts_with_the_column_norms_and_keeps_its_bound():
    model = layer()
    weights = dt.init(DeLoRA(3, strength=4.0).at("path:only"), model)
    torch.testing.assert_close(weights.fixed["0.only.norms"], model.only.weight.norm(dim=0))
    assert weights.count == 3 * (24 + 40) + 1
    method = DeLoRA(3, strength=4.0)
    p = Bag(
        {
            "A": torch.randn(3, 24),
            "B": 1e3 * torch.randn(40, 3),
            "strength": torch.tensor([4.0]),
            "norms": torch.ones(24),
        }
    )
    assert method.weight(p, torch.zeros(40, 24)).norm() <= 4.0 + 1e-4


def test_psoft_equals_peft_with_the_same_tensors():
    from peft import PsoftConfig

    config = PsoftConfig(r=5, psoft_alpha=5, target_modules=["only"])
    names = {"Q": "weight", "a": "vector_a", "b": "vector_b"}
    targets = {leaf: f"psoft_R.default.{name}" for leaf, name in names.items()}
    check_peft(PSOFT(5), config, {**targets, "A": "_psoft_A_cache.default", "B": "_psoft_B_cache.default"})


@torch.no_grad()
def test_psoft_starts_from_the_first_singular_vectors():
    model = layer()
    weights = dt.init(PSOFT(5).at("path:only"), model)
    tensors = {name.rpartition(".")[2]: tensor for name, tensor in weights.held.items()}
    U, S, Vh = torch.linalg.svd(model.only.weight)
    best = (U[:, :5] * S[:5]) @ Vh[:5]
    torch.testing.assert_close(tensors["B"] @ tensors["A"], best, rtol=0, atol=1e-5)
    assert weights.count == 5 * 4 // 2 + 2 * 5


def test_glora_equals_peft_with_the_same_tensors():
    from peft import GloraConfig

    config = GloraConfig(r=3, config_C="none", config_D_E="vector", target_modules=["only"])
    paths = {"As": "A.default.Xu", "Bs": "A.default.Xd", "At": "B.default.Xu", "Bt": "B.default.Xd"}
    paths |= {"d": "D.default.X", "e": "E.default.X"}
    check_peft(GLoRA(3), config, {leaf: f"glora_{path}" for leaf, path in paths.items()})


def test_glora_has_no_leaves_for_a_bias_that_is_not_there():
    assert dt.sites(layer(bias=False), GLoRA(3).at("path:only")).parameters == 2 * 3 * (24 + 40)
    assert dt.sites(layer(), GLoRA(3).at("path:only")).parameters == 2 * 3 * (24 + 40) + 2 * 40


@torch.no_grad()
@pytest.mark.parametrize("alpha", [None, 6])
def test_deft_equals_peft_with_the_same_tensors(alpha):
    from peft import DeftConfig

    model, reference, x = layer(), wrapped(DeftConfig(r=3, alpha=alpha, target_modules=["only"]), layer()), inputs()
    theirs, scale = reference.base_model.model.only, (alpha or 3) / 3
    generator = torch.Generator().manual_seed(5)
    p = {"P0": (40, 3), "D": (40, 3), "S": (3, 24)}
    p = Bag({name: torch.randn(shape, generator=generator) * 0.3 for name, shape in p.items()})
    theirs.deft_P["default"].copy_(p.P0 + p.D)
    theirs.deft_R["default"].copy_(p.P0.relu().T @ model.only.weight / scale + p.S)
    method = DEFT(3, alpha=float(alpha or 0))
    torch.testing.assert_close(method.output(p, x, model(x), model.only), reference(x), rtol=0, atol=1e-5)
    merged = reference.merge_and_unload().only.weight
    torch.testing.assert_close(method.weight(p, model.only.weight), merged, rtol=0, atol=1e-5)
    assert dt.sites(model, method.at("path:only")).parameters == 3 * (24 + 40)


@torch.no_grad()
def test_lily_equals_peft_at_every_position_taken_alone():
    from peft import LilyConfig

    model, reference = layer(), wrapped(LilyConfig(r=3, num_B=2, scaling=0.7, target_modules=["only"]), layer())
    theirs = reference.base_model.model.only
    weights, p = moved(Lily(3, experts=2, scale=0.7), model, size=0.5)
    theirs.lily_A["default"].weight.copy_(p["A"])
    theirs.lily_B["default"].weight.copy_(p["B"].flatten(0, 1))
    theirs.lily_router["default"].weight.copy_(p["C"])
    x = inputs()
    with dt.attach(model, weights):
        ours = model(x)
    assert (ours - model(x)).abs().max() > 1e-2
    for row in range(2):
        for position in range(5):
            alone = reference(x[row : row + 1, position : position + 1])
            torch.testing.assert_close(ours[row, position], alone[0, 0], rtol=0, atol=1e-5)
    assert weights.count == 3 * 24 + 2 * 3 * 40 + 2 * 3


@torch.no_grad()
def test_beft_is_bitfit_on_the_values():
    from peft import BeftConfig

    model, reference, x = layer(), wrapped(BeftConfig(target_modules=["only"]), layer()), inputs()
    weights, p = moved(dt.BitFit(), model)
    reference.base_model.model.only.beft_bias["default"].copy_(p["b"][None])
    with dt.attach(model, weights):
        torch.testing.assert_close(model(x), reference(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        F.linear(x, model.only.weight, model.only.bias + p["b"]), reference(x), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("method", [HiRA, DeLoRA, PSOFT, GLoRA, DEFT, Lily])
@pytest.mark.parametrize(("rank", "words"), [(0, "or more"), (25, "40 x 24; write a rank of at most 24")])
def test_a_rank_that_does_not_fit_is_refused(method, rank, words):
    with pytest.raises(dt.DeltaTuneError, match=words):
        dt.sites(layer(), method(rank).at("path:only"))
