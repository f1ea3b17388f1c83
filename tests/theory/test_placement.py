"""Placement by control: where a task is planted, and what the numbers are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.theory.placement import place_by_control
from tests import tiny


class Lanes(nn.Module):
    """Three linear layers side by side, of which the answer looks at the second alone."""

    def __init__(self):
        super().__init__()
        self.lanes = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x, labels):
        outs = [lane(x) for lane in self.lanes]
        return SimpleNamespace(loss=(outs[1] + 0.01 * outs[2] - labels).square().mean())


def batches(count: int = 3) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, 6, generator=g), "labels": torch.randn(4, 6, generator=g)} for _ in range(count)]


def test_the_budget_goes_where_the_answer_is_made():
    model = tiny.seeded(Lanes)
    found = place_by_control(model, dt.LoRA(rank=1).at("path:lanes.*"), batches(), budget=12)
    assert "lanes.1" in str(found.delta)
    assert "lanes.0" not in str(found.delta)
    assert found.parameters == 12
    assert "lanes.1" in found.finding.partition(",")[0]
    both = place_by_control(model, dt.LoRA(rank=1).at("path:lanes.*"), batches(), budget=24)
    assert "lanes.2" in str(both.delta)
    assert "lanes.0" not in str(both.delta)
    assert not dt.attachments(model)


def test_authority_is_the_squared_slope_for_each_parameter():
    model, data = tiny.seeded(Lanes), batches(1)
    found = place_by_control(model, dt.BitFit().at("path:lanes.1"), data, budget=6)
    b = torch.zeros(6, requires_grad=True)
    loss = (model.lanes[1](data[0]["x"]) + b + 0.01 * model.lanes[2](data[0]["x"]) - data[0]["labels"]).square().mean()
    (slope,) = torch.autograd.grad(loss, b)
    assert list(found.authority.values()) == [pytest.approx(float(slope.square().sum()) / 6, rel=1e-5)]


def test_what_cannot_be_weighed_is_refused():
    model = tiny.seeded(Lanes)
    with pytest.raises(dt.DeltaTuneError, match="holds no candidate; the smallest has 12"):
        place_by_control(model, dt.LoRA(rank=1).at("path:lanes.*"), batches(), budget=5)
    with pytest.raises(dt.DeltaTuneError, match="there are none"):
        place_by_control(model, dt.LoRA(rank=1).at("path:lanes.*"), [], budget=50)
    with pytest.raises(dt.DeltaTuneError, match="trains nothing of its own"):
        place_by_control(model, dt.SAID(dim=8).at("path:lanes.*"), batches(), budget=50)
    assert not dt.attachments(model)


def test_a_placed_delta_attaches_on_an_encoder_decoder():
    model: Any = tiny.t5()
    data = [{**tiny.batch(model), "labels": torch.randint(5, 60, (3, 4))}]
    data[0].pop("decoder_input_ids", None)
    found = place_by_control(model, dt.LoRA(rank=2).at("{attn.{q,v},cross.{q,v},ffn.{up,down}}"), data, budget=1000)
    with dt.attach(model, found.delta) as attachment:
        assert sum(p.numel() for p in attachment.parameters()) == found.parameters <= 1000
