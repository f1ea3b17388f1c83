"""Poly against peft's Poly layer with the same tensors, task by task, and the paper's mixture at a training step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core.method import Bag
from tests import tiny
from tests.laws.cases import busy
from tests.reference.compare import copied


def linear():
    return tiny.seeded(lambda: nn.Sequential(nn.Linear(24, 40)))


@pytest.mark.parametrize(("splits", "task"), [(1, 0), (2, 2)])
def test_poly_equals_peft_with_the_same_tensors(splits, task):
    from peft import PolyConfig
    from peft.tuners.poly.layer import Linear

    model = linear()
    method = dt.Poly(rank=3, skills=5, splits=splits, tasks=3, task=task)
    weights = busy(dt.init(method.at("path:0"), model), size=0.4)
    p = {n.removeprefix("0.0."): t for n, t in weights.tensors.items()}
    layer = Linear(linear()[0], "default", PolyConfig(r=3, n_skills=5, n_splits=splits, n_tasks=3)).eval()
    copied(layer.poly_lora_A["default"], p["A"].mT)
    copied(layer.poly_lora_B["default"], p["B"].mT)
    copied(layer.poly_router["default"].module_logits, p["logits"])
    theirs = {"A": layer.poly_lora_A["default"], "logits": layer.poly_router["default"].module_logits}
    assert weights.count == 5 * 3 * (24 + 40) + 3 * splits * 5
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    bare = model[0](x)
    attachment = dt.attach(model, weights)
    ours, reference = model[0](x), layer(x, task_ids=torch.tensor([task, task]))
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    ours.square().mean().backward()
    reference.square().mean().backward()
    gradients = {n[-1]: t.grad for n, t in attachment.named_parameters()}
    torch.testing.assert_close(gradients["A"], theirs["A"].grad.mT, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients["s"], theirs["logits"].grad, rtol=1e-4, atol=1e-6)


def test_a_training_step_draws_relaxed_bernoulli_gates():
    method, generator = dt.Poly(rank=1, skills=2), torch.Generator().manual_seed(0)
    noise = method.draw(Bag({"noise": torch.zeros(1, 4000)}), generator)["noise"]
    u = torch.sigmoid(noise)
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.std() - 12**-0.5) < 0.02
    p = Bag({
        "A": torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]),
        "B": torch.tensor([[[[1.0], [2.0]], [[3.0], [4.0]]]]),
        "logits": torch.tensor([[0.3, -0.2]]),
        "noise": torch.tensor([[0.5, 1.5]]),
    })  # fmt: skip
    g = [1 / (1 + 2.718281828459045 ** -(0.3 + 0.5)), 1 / (1 + 2.718281828459045 ** -(-0.2 + 1.5))]
    z = [g[0] / sum(g), g[1] / sum(g)]
    B = torch.tensor([z[0] * 1 + z[1] * 3, z[0] * 2 + z[1] * 4])
    torch.testing.assert_close(method.weight(p, torch.zeros(2, 2)), B[:, None] * torch.tensor([z]))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match=r"tasks=2\) has no task 2; write one of 0 to 1"):
        dt.Poly(tasks=2, task=2)
    with pytest.raises(dt.DeltaTuneError, match=r"splits=5\) does not divide the width 24 of '0'.*write splits=4 or 6"):
        dt.sites(linear(), dt.Poly(splits=5).at("path:0"))
    with pytest.raises(dt.DeltaTuneError, match=r"rank=25\) exceeds the dimensions of '0': 40 x 24"):
        dt.sites(linear(), dt.Poly(rank=25).at("path:0"))
