"""FISH, SHiRA, Super-Tuning and task-driven child-tuning: which entries they train, and peft with the same ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.methods._sparse import LargestGradients, LargestSaliency, LargestWeights, SmallestWeights, top_of_all
from deltatune.methods.specification.fish_mask import fish_mask
from tests import tiny
from tests.laws.cases import busy

PLACE = "path:blocks.*.{first,second}"


def linear(d_in=24, d_out=40):
    return tiny.seeded(lambda: nn.Sequential(nn.Linear(d_in, d_out)))


def places(weights):
    return next(t for n, t in weights.fixed.items() if n.endswith("index"))


def run(module, x):
    y = module(x)
    y.square().mean().backward()
    return y


def compare(theirs, parameter, weights, model):
    """Give our values to theirs, and compare outputs and gradients on the same input; the entries are the same already."""
    with torch.no_grad():
        parameter.copy_(next(iter(weights.tensors.values())))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    attachment = dt.attach(model, weights)
    ours, reference = run(model[0], x), run(theirs, x)
    assert (ours - nn.functional.linear(x, model[0].weight, model[0].bias)).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)
    torch.testing.assert_close(next(attachment.parameters()).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_shira_equals_peft_with_the_same_entries():
    from peft import ShiraConfig, get_peft_model

    model = linear()
    weights = busy(dt.init(dt.SHiRA(rank=3).at("path:0"), model, seed=4), size=0.2)
    theirs = get_peft_model(linear(), ShiraConfig(r=3, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    assert weights.count == layer.shira_weight["default"].numel() == 3 * (24 + 40)
    attachment = dt.attach(model, weights)
    index = attachment.leaves._buffers["0/0/index"]
    attachment.detach()
    assert index is not None
    assert index.dtype == torch.int64 and len(set(index.tolist())) == len(index) and not weights.fixed
    layer.shira_indices["default"] = torch.stack([index // 24, index % 24]).int()
    compare(theirs, layer.shira_weight["default"], weights, model)


def test_super_tuning_equals_peft_entry_by_entry():
    from peft import get_peft_model
    from peft.tuners.supertuning import SupertuningConfig

    for entries, top in ((LargestWeights(), True), (SmallestWeights(), False)):
        model = linear()
        weights = busy(dt.init(dt.SuperTuning(share=0.05, entries=entries).at("path:0"), model), size=0.2)
        theirs = get_peft_model(linear(), SupertuningConfig(sparsity=0.95, select_top=top, target_modules=["0"]))
        layer = theirs.base_model.model[0]
        assert sorted(layer.supertuning_indices["default"].tolist()) == places(weights).tolist()
        assert weights.count == layer.supertuning_values["default"].numel() == int(0.05 * 24 * 40)
        layer.supertuning_indices["default"] = places(weights).int()
        compare(theirs, layer.supertuning_values["default"], weights, model)


def test_shira_chooses_by_gradient_and_by_saliency():
    model = linear()
    g = torch.randn(40, 24, generator=torch.Generator().manual_seed(2))
    W = model[0].weight.detach()
    for entries, score in (
        (LargestGradients(), g.abs()),
        (LargestSaliency(), (g * W).abs()),
        (LargestWeights(), W.abs()),
    ):
        weights = dt.init(dt.SHiRA(rank=2, entries=entries).at("path:0"), model, evidence={"gradient": {"0.weight": g}})
        expected = sorted(range(24 * 40), key=lambda i: -score.flatten()[i])[:128]
        assert places(weights).tolist() == sorted(expected)


def test_entries_of_a_transposed_and_packed_weight_are_counted_in_the_linear_map():
    model = tiny.gpt2()
    delta = dt.SuperTuning(share=0.02).at("attn.v[1]")
    weights = busy(dt.init(delta, model))
    packed = model.transformer.h[1].attn.c_attn.weight.detach()  # [d_in, 3 d]
    V = packed[:, 64:].T
    assert places(weights).tolist() == V.abs().flatten().topk(20).indices.sort().values.tolist()
    change = (dt.merge(model, weights)["transformer.h.1.attn.c_attn.weight"] - packed)[:, 64:].T.flatten()
    torch.testing.assert_close(change[places(weights)], next(iter(weights.tensors.values())))
    assert (change != 0).sum() == 20


def fisher_of(model):
    g = torch.Generator().manual_seed(6)
    return {
        n: torch.randn(p.shape, generator=g).square() * (1 + i) for i, (n, p) in enumerate(model.named_parameters())
    }


def test_fish_takes_the_share_of_every_tensor():
    model, share = tiny.plain(), 0.01
    fisher = fisher_of(model)
    for method in (dt.FISH(share), dt.ChildTuningD(share)):
        weights = dt.init(method.at(PLACE), model, evidence={"fisher": fisher})
        held = {address: leaves for address, leaves in by_path_fixed(model, weights).items()}
        assert len(held) == 8
        for address, index in held.items():
            k = max(1, round(share * fisher[address].numel()))
            assert index.tolist() == fisher[address].flatten().topk(k).indices.sort().values.tolist()
        assert weights.count == 4 * round(share * 32 * 48) + 4


def by_path_fixed(model, weights):
    table = dt.sites(model, weights.delta).placements
    return {p.site.address: weights.fixed[p.name("index")] for p in table}


def test_fish_mask_counts_over_all_tensors_together():
    model, share = tiny.plain(), 0.01
    fisher = fisher_of(model)
    delta = fish_mask(model, fisher, share, PLACE)
    weights = dt.init(delta, model, evidence={"fisher": fisher})
    names = [n for n in fisher if n.startswith("blocks") and "scale" not in n]
    least = torch.cat([fisher[n].flatten() for n in names]).sort(descending=True).values
    k = round(share * len(least))
    assert weights.count == k
    held = by_path_fixed(model, weights)
    for name in names:
        chosen = (fisher[name].flatten() >= least[k - 1]).nonzero().flatten()
        assert held.get(name, torch.zeros(0)).tolist() == chosen.tolist()
    assert dt.parse(str(delta)) == delta == dt.parse(delta.to_json())


@torch.no_grad()
def test_only_the_entries_change():
    model = tiny.plain()
    weights = busy(dt.init(dt.FISH(0.01).at(PLACE), model, evidence={"fisher": fisher_of(model)}))
    state, held = dt.merge(model, weights), by_path_fixed(model, weights)
    assert set(state) == set(held)
    for name, tensor in state.items():
        change = (tensor - model.get_parameter(name)).flatten()
        assert change.nonzero().flatten().tolist() == held[name].tolist()
        torch.testing.assert_close(change[held[name]], weights.tensors[f"0.{name}.value"])


def test_the_top_of_all_is_split_exactly_also_where_a_tensor_gets_nothing():
    scores = [torch.tensor([[5.0, 1.0], [0.0, 4.0]]), torch.tensor([0.5, 0.1]), torch.tensor([9.0, 0.2, 8.0, 0.3])]
    assert [t.tolist() for t in top_of_all(scores, 0.4)] == [[0, 3], [], [0, 2]]


def test_what_makes_no_sense_is_refused():
    model = linear(8, 8)
    with pytest.raises(dt.DeltaTuneError, match=r"rank=5.*80 entries.*8 x 8 = 64.*at most 4"):
        dt.sites(model, dt.SHiRA(rank=5).at("path:0"))
    with pytest.raises(dt.DeltaTuneError, match=r"SHiRA\(rank=0\)"):
        dt.SHiRA(rank=0)
    with pytest.raises(dt.DeltaTuneError, match=r"leaves no entry of '0', which has 64.*at least 0\.016"):
        dt.sites(model, dt.SuperTuning(share=0.01).at("path:0"))
    for method in (dt.FISH, dt.SuperTuning, dt.ChildTuningD):
        with pytest.raises(dt.DeltaTuneError, match=rf"{method.__name__}\(share=2\).*above 0 and up to 1"):
            method(share=2)
    with pytest.raises(dt.DeltaTuneError, match="fisher"):
        dt.init(dt.FISH().at("path:0"), model)
