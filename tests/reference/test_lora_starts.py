"""The starts of LoRA against peft's initialisers, or the paper's formula: factors, function, parameters."""

from __future__ import annotations

import copy
import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core.leaf import Given
from deltatune.core.site import Site
from tests.reference.compare import copied
from tests.reference.single import D_IN, D_OUT, PLACE, single

RANK, ALPHA = 4, 10.0
KEPT = {"PiSSA()", "OLoRA()", "CorDA()", 'CorDA(part="smallest")', "LoRAGA()"}


def moment() -> torch.Tensor:
    X = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.2, 2, D_IN)
    return X.T @ X / 200


def gradient() -> torch.Tensor:
    return torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(5))


def ours(start, alpha=ALPHA):
    model = single()
    evidence = {"inputs": {"layer": moment()}, "gradient": {"layer.weight": gradient()}}
    return model, dt.init(dt.LoRA(RANK, alpha, start).at(PLACE), model, evidence=evidence)


def factors(weights) -> tuple[torch.Tensor, torch.Tensor]:
    held = weights.held
    return held["0.layer.A"], held["0.layer.B"]


def peft_layer(init, prepare=None, **more):
    from peft import LoraConfig, get_peft_model

    model = single()
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights=init, **more)
    if prepare:
        prepare(model.layer, config)
    return get_peft_model(model, config).eval().base_model.model.layer


def corda(method):
    def prepare(layer, config):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "attr", dataclasses)  # peft takes `dataclass` from a package it does not require
            from peft.tuners.lora.corda import collect_eigens_for_layer, crop_corda_eigens

        layer.covariance_matrix, layer.corda_method, layer.rank = moment(), method, RANK
        layer.eigens = collect_eigens_for_layer(layer, config)
        crop_corda_eigens(nn.ModuleDict({"layer": layer}), config)

    return prepare


def peft_corda(method):
    from peft.tuners.lora.config import CordaConfig

    return peft_layer("corda", corda(method), corda_config=CordaConfig(corda_method=method))


PEERS = {
    "PiSSA()": lambda: peft_layer("pissa"),
    "OLoRA()": lambda: peft_layer("olora"),
    "MiCA()": lambda: peft_layer("mica"),
    "CorDA()": lambda: peft_corda("ipm"),
    'CorDA(part="smallest")': lambda: peft_corda("kpm"),
}


def start_of(text: str):
    return dt.parse(f"LoRA(init={text})").terms[0].method.init


@torch.no_grad()
@pytest.mark.parametrize("text", PEERS)
def test_a_start_computed_from_the_weight_is_that_of_peft_and_trains_to_the_same_function(text):
    model, weights = ours(start_of(text))
    layer, x = PEERS[text](), torch.randn(5, D_IN)
    A, B = factors(weights)
    torch.testing.assert_close(
        B @ A, layer.lora_B["default"].weight @ layer.lora_A["default"].weight, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(A.abs(), layer.lora_A["default"].weight.abs(), rtol=0, atol=1e-4)
    for tensor in weights.tensors.values():
        tensor.add_(torch.randn_like(tensor) * 0.1)
    # Singular vectors have a sign of their own, so peft's factors are not ours; its base weight is what is compared.
    copied(layer.lora_A["default"].weight, A)
    copied(layer.lora_B["default"].weight, B)
    before = model(x)
    with dt.attach(model, weights):
        torch.testing.assert_close(model(x), layer(x), rtol=0, atol=1e-4)
        assert (model(x) - before).abs().max() > 1e-2


@torch.no_grad()
def test_lora_ga_is_peft_s_up_to_the_signs_of_singular_vectors():
    from peft.tuners.lora.config import LoraGAConfig

    for direction in ("ArB2r", "A2rBr", "ArBr"):

        def prepare(layer, config):
            layer._peft_loraga_grad = gradient()

        layer = peft_layer("lora_ga", prepare, lora_ga_config=LoraGAConfig(direction=direction))
        _, weights = ours(dt.LoRAGA(direction))
        A, B = factors(weights)
        torch.testing.assert_close(A.abs(), layer.lora_A["default"].weight.abs(), rtol=0, atol=1e-3)
        torch.testing.assert_close(B.abs(), layer.lora_B["default"].weight.abs(), rtol=0, atol=1e-3)


@torch.no_grad()
def test_eva_holds_the_leading_right_singular_vectors_of_the_inputs():
    X = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, D_IN)
    model = single()
    weights = dt.init(dt.LoRA(RANK, ALPHA, dt.EVA()).at(PLACE), model, evidence={"inputs": {"layer": X.T @ X / 300}})
    A, B = factors(weights)
    reference = torch.linalg.svd(X, full_matrices=False).Vh[:RANK]
    torch.testing.assert_close((A * reference).sum(1).abs(), torch.ones(RANK), rtol=0, atol=1e-4)
    assert not B.any()


@torch.no_grad()
@pytest.mark.parametrize("text", [*PEERS, "LoRAGA()", "EVA()", "OrthogonalStart()", "LoRAPlus(start=PiSSA())"])
def test_a_start_is_neutral_and_keeps_what_it_has_to(text):
    model, weights = ours(start_of(text))
    x = torch.randn(7, D_IN)
    before = model(x)
    with dt.attach(model, weights):
        torch.testing.assert_close(model(x), before, rtol=0, atol=2e-6)
    assert weights.count == (RANK * D_IN if text == "MiCA()" else RANK * (D_IN + D_OUT))
    kept = {"A0", "B0"} if text in KEPT or "start=" in text else {"B"} if text == "MiCA()" else set()
    assert {name.rpartition(".")[2] for name in weights.fixed} == kept


@torch.no_grad()
def test_what_is_attached_is_what_is_merged_after_training_from_pissa():
    model, weights = ours(dt.PiSSA())
    for tensor in weights.tensors.values():
        tensor.add_(torch.randn_like(tensor) * 0.1)
    x = torch.randn(7, D_IN)
    with dt.attach(model, weights):
        attached = model(x)
    with dt.merge_(model, weights):
        torch.testing.assert_close(model(x), attached, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("text", ["PiSSA()", "OLoRA()", "CorDA()", "LoRAGA()", "EVA()", "MiCA()"])
def test_a_start_reads_the_weights_and_the_evidence_of_packed_and_transposed_layers(text):
    from tests.laws.cases import BACKBONES, busy, fresh, output

    model = BACKBONES["gpt2"]().double()
    delta = dt.LoRA(RANK, ALPHA, start_of(text)).at("attn.{q,v}")
    with torch.enable_grad():
        weights = fresh(delta, model)
    before = output(model)
    with dt.attach(model, weights):
        torch.testing.assert_close(output(model), before, rtol=0, atol=1e-9)
    moved = busy(weights)
    with dt.attach(model, moved):
        attached = output(model)
    assert (attached - before).abs().max() > 1e-3
    with dt.merge_(model, moved):
        torch.testing.assert_close(output(model), attached, rtol=0, atol=1e-9)


def test_the_orthogonal_start_has_two_random_factors_with_no_product():
    A, B = factors(ours(dt.OrthogonalStart())[1])
    assert A.abs().min() > 0
    assert B.abs().min() > 0
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == RANK // 2
    torch.testing.assert_close(B @ A, torch.zeros(D_OUT, D_IN), rtol=0, atol=1e-6)
    assert 0.03 < A.std() < 0.15


def rounded_by_hand(W: torch.Tensor, block: int) -> torch.Tensor:
    levels = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    levels += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    flat, out = W.flatten().tolist(), []
    for i in range(0, len(flat), block):
        run = flat[i : i + block]
        top = max(abs(v) for v in run)
        out += [top * min(levels, key=lambda level, v=v, top=top: abs(level - v / top)) for v in run]
    return torch.tensor(out).view_as(W)


@torch.no_grad()
def test_loftq_makes_up_for_what_rounding_to_4_bits_loses():
    model, weights = ours(dt.LoftQ(steps=1, block=64))
    W, (A, B) = model.layer.weight, factors(weights)
    Q = rounded_by_hand(W, 64)
    torch.testing.assert_close(dt.LoftQ(1, 64).rounded(W, RANK), Q, rtol=0, atol=1e-4)
    U, S, Vt = torch.linalg.svd(W - Q)
    best = U[:, :RANK] @ S[:RANK].diag() @ Vt[:RANK]
    torch.testing.assert_close(ALPHA / RANK * B @ A, best, rtol=0, atol=1e-4)
    again = rounded_by_hand(W - best, 64)
    torch.testing.assert_close(dt.LoftQ(2, 64).rounded(W, RANK), again, rtol=0, atol=1e-4)
    assert (W - Q - best).norm() < 0.9 * (W - Q).norm()
    assert "4 bits" in dt.LoRA(init=dt.LoftQ()).breaks["identity"]
    assert dt.LoRA().breaks == dt.LoRA(init=dt.PiSSA()).breaks == {}


def test_presets_set_the_scale_and_the_rate():
    from deltatune.methods.reparameterization.lora import loraplus, rslora

    assert rslora(16, 8.0) == dt.LoRA(16, 32.0)
    site = Site(role="", path="0", kind="linear", d_in=D_IN, d_out=D_OUT)
    leaves = loraplus(ratio=4.0).leaves(site)
    assert (leaves["A"].rate, leaves["B"].rate) == (1.0, 4.0)
    both = dt.LoRA(init=dt.LoRAPlus(8.0, dt.PiSSA())).leaves(site)
    assert [(n, leaf.rate) for n, leaf in both.items()] == [("A", 1.0), ("B", 8.0), ("A0", 1.0), ("B0", 1.0)]
    p = SimpleNamespace(**{n: torch.randn(leaf.shape) for n, leaf in both.items()})
    assert dt.LoRA(init=dt.LoRAPlus(8.0, dt.PiSSA())).unfold(p).A.shape == (16, D_IN)


@pytest.mark.parametrize(
    ("start", "rank", "message"),
    [
        ("OrthogonalStart()", 3, "rank=3 is odd, write 4"),
        ("LoRAGA()", 11, "needs 2 x rank = 22 singular vectors, but 'layer' is 20 x 24; write a rank of at most 10"),
        ("PiSSA()", 21, r"LoRA\(rank=21\) exceeds the dimensions of 'layer': 20 x 24"),
        ("EVA()", 4, "starts from .*inputs.*: pass init"),
    ],
)
def test_a_start_that_does_not_fit_says_what_to_write(start, rank, message):
    with pytest.raises(dt.DeltaTuneError, match=message):
        dt.init(dt.LoRA(rank, init=start_of(start)).at(PLACE), single())


def test_inputs_that_cannot_be_inverted_are_refused():
    given = Given(Site("", "0", d_in=3, d_out=3), {"weight": torch.eye(3)}, {"inputs": {"0": torch.zeros(3, 3)}})
    with pytest.raises(dt.DeltaTuneError, match="cannot invert"):
        dt.CorDA().factors(1, 1.0, given)


def test_a_spec_from_before_the_starts_still_reads():
    old = [{"where": "attn.q", "method": {"LoRA": {"rank": 8, "alpha": 16.0, "init": {"Normal": {"std": 0.02}}}}}]
    assert dt.parse(copy.deepcopy(old)) == dt.LoRA(init=dt.Normal(0.02)).at("attn.q")
    assert dt.LoRA(init=dt.Normal(0.02)).at("attn.q").to_json() == old


@pytest.mark.parametrize("method", [dt.LoRA(RANK, init=dt.PiSSA()), dt.LoRAXS(RANK), dt.PSOFT(RANK), dt.OSF()], ids=str)
def test_a_weight_is_decomposed_once_for_all_leaves_of_a_site_and_they_share_no_memory(method, monkeypatch):
    decompose, seen = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda M, **how: seen.append(M) or decompose(M, **how))
    weights = dt.init(method.at(PLACE) + method.at(PLACE), single())
    assert len(seen) == 2
    stores = [tensor.untyped_storage().data_ptr() for tensor in weights.held.values()]
    assert len(set(stores)) == len(stores) > 2
