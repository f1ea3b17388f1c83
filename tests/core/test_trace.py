"""Tracing: modules whose weight is read by someone else are reported as silent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from tests import tiny

WIDTH = 16


class Attending(nn.Module):
    """torch's own attention, which reads out_proj's weight without calling it, behind a linear layer that is called."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.first(x)
        return self.attention(x, x, x, need_weights=False)[0]


def example():
    return {"x": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", [dt.LoRA(rank=2), dt.Adapter(size=2), dt.BitFit(), dt.Full()], ids=str)
def test_a_module_whose_weight_is_read_by_its_parent_is_silent(method, training):
    model = tiny.seeded(Attending).train(training)
    bare = model(**example())
    with dt.attach(model, method.at("path:attention.out_proj")) as attachment:
        with torch.no_grad():
            for leaf in attachment.parameters():
                leaf.add_(0.5)
        found = dt.trace(model, example())
        assert (found.fired, found.silent) == ((), ("attention.out_proj",))
        # the delta has no effect, as the report says
        torch.testing.assert_close(model(**example()), bare, rtol=0, atol=1e-6)
        assert "never called: attention.out_proj" in str(found)
        assert "0 of 1 adapted modules were called" in str(found)


def test_called_and_uncalled_modules_are_told_apart():
    model = tiny.seeded(Attending)
    dt.attach(model, dt.LoRA(rank=2).at("path:{first,attention.out_proj,unused}"))
    found = dt.trace(model, example())
    assert found.fired == ("first",)
    assert found.silent == ("attention.out_proj", "unused")


def test_full_on_the_parent_reaches_its_own_packed_parameters_only():
    model = tiny.seeded(Attending)
    bare = model(**example())
    with dt.attach(model, dt.Full().at("path:attention")) as attachment:
        assert dt.trace(model, example()).silent == ("attention.out_proj",)
        with torch.no_grad():
            dict(attachment.named_parameters())["0.attention.in_proj_weight.value"].add_(0.5)
        assert (model(**example()) - bare).abs().max() > 1e-3


def test_merging_reaches_what_tracing_calls_silent():
    model = tiny.seeded(Attending)
    bare = model(**example())
    weights = dt.init(dt.LoRA(rank=2).at("path:attention.out_proj"), model)
    for tensor in weights.tensors.values():
        tensor.add_(0.5)
    merged = dt.merge(model, weights)["attention.out_proj.weight"]
    with dt.merge_(model, weights):
        assert torch.equal(model.attention.out_proj.weight, merged)
        assert (model(**example()) - bare).abs().max() > 1e-3
    torch.testing.assert_close(model(**example()), bare, rtol=0, atol=1e-6)


def test_tracing_leaves_no_hook_and_no_mode_behind():
    model = tiny.plain().train()
    dt.attach(model, dt.LoRA(rank=2).at("path:**.first"))
    found = dt.trace(model, tiny.batch(model))
    assert found.silent == ()
    assert str(found) == "2 of 2 adapted modules were called"
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with pytest.raises(TypeError):
        dt.trace(model, {"nonsense": 1})
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_tracing_a_bare_model_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="no delta is attached to this model; attach one, then trace"):
        dt.trace(tiny.plain(), {})
