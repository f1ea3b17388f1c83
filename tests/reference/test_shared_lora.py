"""VB-LoRA, Uni-LoRA and RandLoRA against peft with the same shared tensors: function, parameters, errors."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.reference.compare import copied
from tests.reference.single import assert_same, leaves_of, peft_single, single, started


def test_vb_lora_equals_peft_with_the_same_bank_and_logits():
    from peft import VBLoRAConfig

    model, weights = started(dt.VBLoRA(rank=3, vectors=9, size=4, top=2), size=0.5)
    config = VBLoRAConfig(r=3, num_vectors=9, vector_length=4, topk=2, target_modules=["layer"])
    layer, leaves = peft_single(config), leaves_of(model, weights)
    copied(layer.vblora_logits_A["default"], leaves["A"])
    copied(layer.vblora_logits_B["default"], leaves["B"])
    copied(layer.vblora_vector_bank["default"], leaves["v"])
    assert_same(model, weights, layer)
    assert weights.count == sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert weights.count == 3 * (24 + 20) * 9 // 4 + 9 * 4


@torch.no_grad()
def test_vb_lora_cuts_the_last_run_of_a_width_that_its_size_does_not_divide():
    method = dt.VBLoRA(rank=2, vectors=5, size=7, top=3)
    model, weights = started(method, size=0.5)
    held = {n.rpartition(".")[2]: t for n, t in weights.tensors.items()}

    def run(logits):
        values, index = logits.sort(descending=True)
        share = values[:3].exp() / values[:3].exp().sum()
        return sum(share[k] * held["v"][index[k]] for k in range(3))

    A = torch.stack([torch.cat([run(held["A"][i, j]) for j in range(4)])[:24] for i in range(2)])
    B = torch.stack([torch.cat([run(held["B"][j, i]) for j in range(3)])[:20] for i in range(2)], 1)
    W = dt.merge(model, weights)["layer.weight"]
    torch.testing.assert_close(W, model.layer.weight + B @ A, rtol=0, atol=1e-5)


def test_uni_lora_equals_peft_with_the_same_indices():
    from peft import UniLoraConfig

    model, weights = started(dt.UniLoRA(rank=3, size=16), size=0.5)
    layer = peft_single(UniLoraConfig(r=3, theta_d_length=16, target_modules=["layer"]))
    leaves = leaves_of(model, weights)
    j = leaves["j"].view(3, 44)
    count = torch.bincount(leaves["j"], minlength=16)
    assert count.max() - count.min() <= 1
    assert torch.equal(count.sort().values, total(layer).sort().values)
    copied(layer.unilora_indices_A["default"], j[:, :24])
    copied(layer.unilora_indices_B["default"], j[:, 24:].T)
    for side in "AB":
        index = vars(layer)["_modules"][f"unilora_indices_{side}"]["default"]
        copied(vars(layer)["_modules"][f"unilora_scales_{side}"]["default"], count[index].float().rsqrt())
    copied(layer.unilora_theta_d["default"], leaves["theta"])
    assert_same(model, weights, layer)
    assert weights.count == 16


def total(layer):
    """How often peft uses each entry of its vector."""
    return torch.bincount(
        torch.cat([layer.unilora_indices_A["default"].flatten(), layer.unilora_indices_B["default"].flatten()]),
        minlength=16,
    )


@torch.no_grad()
def test_the_map_of_uni_lora_keeps_lengths():
    method = dt.UniLoRA(rank=3, size=16)
    model, weights = started(method)
    from deltatune.core.method import Bag

    leaves = leaves_of(model, weights)
    A, B = method._factors(Bag(leaves), 24)
    torch.testing.assert_close(A.square().sum() + B.square().sum(), leaves["theta"].square().sum())


@torch.no_grad()
@pytest.mark.parametrize("size", [10, 100, 3000])
def test_all_sites_of_uni_lora_together_share_its_vector_evenly(size):
    from deltatune.core.method import Bag

    method, model = dt.UniLoRA(rank=3, size=size), tiny.llama()
    weights = dt.init(method, model, seed=4)
    theta, lengths = weights.tensors["0.*.theta"], 0
    with dt.attach(model, weights) as attachment:
        held = dict(attachment.named_tensors())
    j = torch.cat([tensor for name, tensor in held.items() if name.endswith(".j")])
    assert len(j) == 3 * 3 * (32 + 32 + 32 + 16)
    assert torch.equal(torch.bincount(j, minlength=size), held["0.*.n"])
    assert held["0.*.n"].max() - held["0.*.n"].min() <= 1
    for name in (name for name in held if name.endswith(".j")):
        A, B = method._factors(Bag({"j": held[name], "n": held["0.*.n"], "theta": theta}), 32)
        lengths += A.square().sum() + B.square().sum()
    torch.testing.assert_close(lengths, theta[held["0.*.n"] > 0].square().sum())


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (24, 24)])
def test_rand_lora_equals_peft_with_the_same_bases(shape):
    from peft import RandLoraConfig

    d_in, d_out = shape
    size = {"d_in": d_in, "d_out": d_out}
    model, weights = started(dt.RandLoRA(rank=8), size=0.05, **size)
    config = RandLoraConfig(r=8, randlora_alpha=160, target_modules=["layer"])
    layer, leaves = peft_single(config, **size), leaves_of(model, weights)
    n, m, M = 3, min(shape), max(shape)
    A, B = (next(t for name, t in leaves.items() if name.startswith(f"{side}_")) for side in "AB")
    assert abs(A.std() - 1) < 0.1
    assert abs(B.std() - 1) < 0.1
    # peft flattens its two factors in different orders, so its entry (row, j, k) of B is this one:
    reordered = B.permute(1, 2, 0).reshape(M, n * 8).view(M, n, 8)
    own = vars(layer)["_modules"]
    own["randlora_A"]["default"] = A[:, None]
    own["randlora_B"]["default"] = reordered
    copied(layer.randlora_lambda["default"], leaves["l"].T)
    copied(layer.randlora_gamma["default"], leaves["g"])
    assert_same(model, weights, layer, tolerance=1e-4)
    assert weights.count == n * (8 + m) == sum(p.numel() for p in layer.parameters() if p.requires_grad)


def test_shared_tensors_are_held_once():
    model = tiny.llama()
    assert dt.sites(model, dt.UniLoRA(size=64)).parameters == 64
    per_site = 4 * 32 * 9 // 16 + 4 * 32 * 9 // 16, 4 * 32 * 9 // 16 + 4 * 16 * 9 // 16
    assert dt.sites(model, dt.VBLoRA(vectors=9, size=16)).parameters == 3 * sum(per_site) + 9 * 16


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("VBLoRA(top=3, vectors=2)", "picks more vectors than vectors=2; write a top of at most 2"),
        ("VBLoRA(size=0)", r"size=0\) cannot be built"),
        ("UniLoRA(size=0)", r"size=0\) cannot be built"),
        ("RandLoRA(rank=0)", r"rank=0\) cannot be built"),
    ],
)
def test_what_makes_no_sense_is_refused(written, message):
    with pytest.raises(dt.DeltaTuneError, match=message):
        dt.parse(written)


@pytest.mark.parametrize("method", [dt.VBLoRA(rank=21), dt.UniLoRA(rank=21)])
def test_a_rank_that_does_not_fit_is_refused(method):
    with pytest.raises(dt.DeltaTuneError, match=r"rank=21\) exceeds the dimensions of 'layer': 20 x 24"):
        dt.sites(single(), method.at("path:layer"))
