"""Tracing: modules whose weight is read by someone else are reported as silent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from tests import tiny

WIDTH = 16


class Reading(nn.Module):
    """A linear layer that is called, one whose weight its parent reads without calling it, and one that nobody reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return nn.functional.linear(self.first(x), self.inner.weight, self.inner.bias)


class Encoding(nn.Module):
    """torch's own encoder layer, which in evaluation reads all weights at once and calls none of its modules."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x)


def example():
    return {"x": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))}


@torch.no_grad()
def moved(attachment):
    for leaf in attachment.parameters():
        leaf.add_(0.5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", [dt.LoRA(rank=2), dt.Adapter(size=2), dt.BitFit(), dt.Full()], ids=str)
def test_a_module_whose_weight_is_read_by_its_parent_is_silent(method, training):
    model = tiny.seeded(Reading).train(training)
    bare = model(**example())
    with dt.attach(model, method.at("path:inner")) as attachment:
        moved(attachment)
        found = dt.trace(model, example())
        assert (found.fired, found.silent) == ((), ("inner",))
        # the delta has no effect, as the report says
        torch.testing.assert_close(model(**example()), bare, rtol=0, atol=1e-6)
        assert "never called: inner" in str(found)
        assert "0 of 1 adapted modules were called" in str(found)


def test_called_and_uncalled_modules_are_told_apart():
    model = tiny.seeded(Reading)
    dt.attach(model, dt.LoRA(rank=2).at("path:{first,inner,unused}"))
    found = dt.trace(model, example())
    assert found.fired == ("first",)
    assert found.silent == ("inner", "unused")


@torch.no_grad()
def test_merging_reaches_what_tracing_calls_silent():
    model = tiny.seeded(Reading)
    bare = model(**example())
    weights = dt.init(dt.LoRA(rank=2).at("path:inner"), model)
    for tensor in weights.tensors.values():
        tensor.add_(0.5)
    merged = dt.merge(model, weights)["inner.weight"]
    with dt.merge_(model, weights):
        assert torch.equal(model.inner.weight, merged)
        assert (model(**example()) - bare).abs().max() > 1e-3
    torch.testing.assert_close(model(**example()), bare, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_fast_path_of_torch_encoder_layers_is_silent_and_the_ordinary_one_is_not():
    model, places = tiny.seeded(Encoding), ("layer.self_attn", "layer.linear1", "layer.linear2")
    delta = dt.LoRA(rank=2).at("path:layer.{self_attn.out_proj,linear1,linear2}")
    bare = model(**example())
    with dt.attach(model, delta) as attachment:
        moved(attachment)
        found = dt.trace(model, example())
        assert (found.fired, found.silent) == ((), places)
        torch.testing.assert_close(model(**example()), bare, rtol=0, atol=1e-6)
        model.train()
        assert dt.trace(model, example()) == dt.Trace(places, (), places[1:])
        assert (model(**example()) - bare).abs().max() > 1e-2
        model.eval()
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert dt.trace(model, example()) == dt.Trace(places, (), places[1:])
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


def test_tracing_leaves_no_hook_and_no_mode_behind():
    model = tiny.plain().train()
    dt.attach(model, dt.LoRA(rank=2).at("path:**.first"))
    found = dt.trace(model, tiny.batch(model))
    assert found.silent == ()
    assert str(found) == "2 of 2 adapted modules were called; 2 of them train on a fused path"
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(TypeError):
        dt.trace(model, {"nonsense": 1})
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_tracing_a_bare_model_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="no delta is attached to this model; attach one, then trace"):
        dt.trace(tiny.plain(), {})
