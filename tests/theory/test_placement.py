"""Placement by control: where a task is planted, and what the numbers are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.theory.placement import even_worth, place_by_control, place_by_worth, random_worth
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


ROW = dt.LoRA(rank=1).at("path:blocks.*.{first,second}")


def placed(worth: dict[str, float], count: int) -> list[int]:
    """Which of the plain model's candidates, by their place in order, a budget for `count` of one size buys."""
    model, names = tiny.plain(), list(worth)
    each = dt.sites(model, ROW).parameters // len(names)
    delta, parameters = place_by_worth(model, ROW, worth, count * each)
    assert parameters == count * each
    return [i for i, name in enumerate(names) if name.partition(" at ")[2].removeprefix("path:") in str(delta)]


def test_an_authority_that_is_known_is_placed_again_under_any_budget():
    model = tiny.seeded(Lanes)
    candidates = dt.LoRA(rank=1).at("path:lanes.*")
    for budget in (12, 24, 36):
        found = place_by_control(model, candidates, batches(), budget)
        assert place_by_worth(model, candidates, found.authority, budget) == (found.delta, found.parameters)


def test_an_even_worth_spreads_every_budget():
    worth = even_worth(tiny.plain(), ROW)
    count = len(worth)
    assert len(set(worth.values())) == count >= 4
    for bought in range(1, count + 1):
        at = placed(worth, bought)
        gaps = [b - a for a, b in zip([at[-1] - count, *at], at, strict=False)]
        assert at[0] == 0 and max(gaps) <= 2 * count / bought


def test_a_random_worth_depends_on_the_seed_alone():
    model = tiny.plain()
    assert random_worth(model, ROW, 1) == random_worth(model, ROW, 1)
    found = {tuple(placed(random_worth(model, ROW, seed), 1)) for seed in range(20)}
    assert len(found) > 2


def test_a_worth_that_lacks_a_candidate_is_refused():
    worth = even_worth(tiny.plain(), ROW)
    worth.pop(next(iter(worth)))
    with pytest.raises(dt.DeltaTuneError, match=r"there is no worth of 'LoRA\(rank=1\) at "):
        place_by_worth(tiny.plain(), ROW, worth, 1000)
