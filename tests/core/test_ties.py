"""Parameters and modules that several places share: what a delta changes there, and what merging makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from tests import tiny
from tests.core.targets import Over
from tests.laws.cases import busy, output

TIED = [dt.LoRA(rank=2), dt.DoRA(rank=2), dt.IA3(), dt.OFT(block=8), dt.Scale(dt.LoRA(rank=2), by=0.5)]


@torch.no_grad()
@pytest.mark.parametrize("where", ["embed", "head", "{embed,head}"])
@pytest.mark.parametrize("method", TIED, ids=str)
def test_a_tied_table_is_changed_where_it_is_written_and_merged_into_copies(method, where):
    model = tiny.qwen2().double()
    table = model.model.embed_tokens.weight
    weights = busy(dt.init(method.at(where), model), size=0.3)
    h = torch.randn(2, tiny.WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(5)
    rows, scores, bare = model.model.embed_tokens(ids), model.lm_head(h), output(model)
    with dt.attach(model, weights):
        assert torch.equal(model.model.embed_tokens(ids), rows) is (where == "head")
        assert torch.equal(model.lm_head(h), scores) is (where == "embed")
        attached = output(model)
    with pytest.raises(dt.DeltaTuneError, match=r"is shared with .*; pass untie=True to give it its own copy"):
        dt.merge_(model, weights)
    with dt.merge_(model, weights, untie=True):
        torch.testing.assert_close(output(model), attached, rtol=0, atol=1e-9)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight is table
    assert torch.equal(output(model), bare)


@torch.no_grad()
@pytest.mark.parametrize("where", ["embed", "{embed,head}"])
def test_three_places_of_one_table_get_values_of_their_own(where):
    model = tiny.t5().double()
    weights = busy(dt.init(dt.LoRA(rank=2).at(where), model), size=0.3)
    with dt.attach(model, weights):
        attached = output(model)
    with pytest.raises(dt.DeltaTuneError, match="to which the delta gives another value"):
        dt.merge(model, weights)
    with dt.merge_(model, weights, untie=True):
        torch.testing.assert_close(output(model), attached, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("method", [dt.Full(), dt.TrainableTokens(tokens=(1, 7, -1)), dt.DiffPruning()], ids=str)
def test_a_tied_table_is_one_parameter_to_methods_on_tensors(method):
    model = tiny.qwen2().double()
    for where in ("embed", "head", "{embed,head}"):
        weights = busy(dt.init(method.at(where), model), size=0.3)
        assert len({p.site.address for p in dt.sites(model, method.at(where)).placements}) == 1
        with dt.attach(model, weights):
            attached = output(model)
        with dt.merge_(model, weights):
            torch.testing.assert_close(output(model), attached, rtol=0, atol=1e-9)
            assert model.lm_head.weight is model.model.embed_tokens.weight
    delta = method.at("embed") + dt.LoRA(rank=2).at("head")
    weights = busy(dt.init(delta, model), size=0.3)
    with dt.attach(model, weights):
        attached = output(model)
    with pytest.raises(dt.DeltaTuneError, match="to which the delta gives another value"):
        dt.merge(model, weights)
    with dt.merge_(model, weights, untie=True):
        torch.testing.assert_close(output(model), attached, rtol=0, atol=1e-9)


@torch.no_grad()
def test_one_module_under_two_paths_is_one_place():
    class Twice(Over):
        def __init__(self):
            super().__init__(nn.Linear(8, 8))
            self.again = self.only

        def forward(self, x):
            return self.again(self.only(x))

    model, x = tiny.seeded(Twice).double(), torch.randn(3, 8, dtype=torch.float64)
    weights = busy(dt.init(dt.LoRA(rank=2).at("path:*"), model))
    assert list(weights.tensors) == ["0.only.A", "0.only.B"]
    with dt.attach(model, weights):
        attached = model(x)
    with dt.merge_(model, weights):
        torch.testing.assert_close(model(x), attached, rtol=0, atol=1e-12)
