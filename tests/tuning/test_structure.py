"""Structure search: it finds the planted site, keeps the budget, gives an ordinary delta, and leaves the model alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.tuning.structure import address, search_structure, solve
from tests import tiny


class Parallel(nn.Module):
    """Three linear maps side by side, of three different parts of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([m(x[:, i]) for i, m in enumerate(self.maps)], 1)


PLACE = "path:**.maps.*"
CANDIDATES = dt.LoRA(rank=2).at(PLACE) + dt.BitFit().at(PLACE)


@pytest.mark.parametrize("planted", [0, 1, 2])
def test_the_planted_site_is_found_within_the_budget(planted):
    """Only one map has to change, and by a product, so that a bias there helps little."""
    torch.manual_seed(0)
    model = Parallel()
    inputs = torch.randn(4, 32, 3, 6)
    with torch.no_grad():
        targets = [model(x) for x in inputs]
        change = torch.randn(5, 2) @ torch.randn(2, 6)
        for x, target in zip(inputs, targets, strict=True):
            target[:, planted] += x[:, planted] @ change.T
    batches = [{"x": torch.cat([x, y], -1)} for x, y in zip(inputs, targets, strict=True)]
    before = [p.clone() for p in model.parameters()]
    reader = Compared(model)
    found = search_structure(
        reader, CANDIDATES, batches[:3], batches[3:], budget=22, steps=150, lr=3e-2, loss=lambda y: y
    )
    assert str(found.delta) == f'LoRA(rank=2).at("{{path:model.maps.{planted}}}")'
    assert dt.sites(reader, found.delta).parameters == found.parameters == 22
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not dt.attachments(reader)


class Compared(nn.Module):
    """The squared error of a model against targets that come with the inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.model(x[..., :6]) - x[..., 6:]).square().mean()


def test_the_shift_meets_the_budget():
    alpha, sizes = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([10.0, 20.0, 30.0])
    p = torch.sigmoid((alpha - solve(alpha, sizes, 25.0, 0.7)) / 0.7)
    torch.testing.assert_close((sizes * p).sum(), torch.tensor(25.0), rtol=0, atol=1e-3)


def test_a_budget_that_holds_nothing_and_no_batches_are_refused():
    model, batch = Parallel(), {"x": torch.zeros(2, 3, 6)}
    with pytest.raises(dt.DeltaTuneError, match="a budget of 3 parameters holds no candidate; the smallest has 5"):
        search_structure(model, CANDIDATES, [batch], [batch], budget=3)
    with pytest.raises(dt.DeltaTuneError, match="one of them is empty"):
        search_structure(model, CANDIDATES, [], [batch], budget=1000)
    assert not dt.attachments(model)


def test_a_place_in_a_packed_module_is_named_by_its_role():
    model = tiny.gpt2()
    sites = [p.site for p in dt.sites(model, dt.LoRA(rank=2).at("attn.v")).placements]
    assert [address(site) for site in sites] == ["attn.v[0]", "attn.v[1]"]
