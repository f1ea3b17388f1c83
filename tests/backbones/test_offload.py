"""Deltas on backbones that accelerate keeps out of the way between calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload

import deltatune as dt
from tests import tiny
from tests.laws.cases import busy, gradients, output

METHODS = [
    dt.LoRA(rank=4),
    dt.Adapter(size=8),
    dt.ParallelAdapter(size=8),
    dt.PrefixTuning(length=5),
    dt.PromptTuning(length=3),
    dt.BitFit(),
    dt.VeRA(rank=8),
]


def offloaded() -> Any:
    return cpu_offload(tiny.llama(), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_delta_on_an_offloaded_backbone_does_and_trains_the_same(method):
    wanted, model = tiny.llama(), offloaded()
    weights = busy(dt.init(method, wanted))
    bare = output(model)
    with dt.attach(wanted, weights) as one, dt.attach(model, weights) as two:
        assert torch.equal(output(model), output(wanted))
        for each in (one.model, two.model):
            output(each).square().mean().backward()
        theirs = dict(one.named_parameters())
        for name, p in two.named_parameters():
            torch.testing.assert_close(p.grad, theirs[name].grad)
        assert all(g is None for g in gradients(model))
        assert two.weights.tensors.keys() == weights.tensors.keys()
    assert torch.equal(output(model), bare)


def test_attached_before_offloading_it_says_so():
    model = tiny.llama()
    dt.attach(model, dt.LoRA())
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        dt.DeltaTuneError, match=r"leaves of LoRA\(\) were taken to the meta device.*offload the backbone first"
    ):
        output(model)


@pytest.mark.parametrize("method", [dt.LNTuning(), dt.LoRA().at("embed")], ids=str)
def test_new_values_for_what_is_offloaded_are_refused(method):
    model = offloaded()
    with pytest.raises(
        dt.DeltaTuneError, match=r"which is offloaded and comes back for each call\. Keep that module on"
    ):
        dt.attach(model, method)
    assert dt.attachments(model) == {}


def test_a_method_that_looks_at_an_offloaded_weight_is_refused():
    with pytest.raises(dt.DeltaTuneError, match=r"Linear is on the meta device.*do not offload what a method looks at"):
        dt.attach(offloaded(), dt.DoRA())
