"""The intrinsic dimension of planted problems, and the reading of d_90 from scores."""

from __future__ import annotations

from math import exp

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.theory.intrinsic import IntrinsicDimension, crossing, sweep, sweep_runs
from tests.theory.planted import numbers

PLANTED, SIZE = 20, 1000


class Sums(nn.Module):
    """1000 parameters of which 20 sums matter, so training needs 20 dimensions (Li et al., 2018, section 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, 1, bias=False)

    def forward(self) -> torch.Tensor:
        groups = torch.eye(PLANTED).repeat_interleave(SIZE // PLANTED, 1)
        return self.layer(groups)[:, 0]


@pytest.fixture(scope="module")
def sums():
    torch.manual_seed(0)
    return Sums()


def trained(model, delta, seed):
    """exp(-loss) of the best point that the delta reaches; the model is linear in z, so one least-squares step finds it."""
    with dt.attach(model, delta, seed=seed) as a:
        (z,) = a.parameters()
        start = model() - numbers(PLANTED, seed=9).float()
        J = torch.stack([torch.autograd.grad(s, z, retain_graph=True)[0].flatten() for s in start]).double()
        start = start.detach().double()
        left = start + J @ torch.linalg.lstsq(J, -start[:, None], driver="gelsd").solution[:, 0]
        return exp(-float(left.square().sum()))


@pytest.mark.parametrize("dims", [[8, 12, 16, 20, 24, 28], [10, 15, 18, 21, 30]])
def test_a_planted_dimension_is_recovered_within_a_tenth(sums, dims):
    found = sweep(lambda d, seed: trained(sums, dt.DID(dim=d), seed), lambda seed: 1.0, dims, range(3))
    assert found.dimension == pytest.approx(PLANTED, rel=0.1)
    assert found.interval is not None and found.dimension is not None
    assert found.interval[0] <= found.dimension <= found.interval[1]
    assert f"d_90 is {found.dimension:.0f}" in found.finding


def test_the_threshold_is_read_between_two_dimensions_along_log_d():
    assert crossing([10, 100], [0.0, 1.0], 0.5) == pytest.approx(10**1.5)
    assert crossing([10, 100], [0.7, 1.0], 0.5) == 10.0
    assert crossing([10, 100], [0.1, 0.2], 0.5) is None
    assert crossing([1, 2, 4, 8], [0.0, 0.8, 0.4, 1.0], 0.6) == pytest.approx(2.0), "a fall is smoothed away: 0.6, 0.6"


def test_seeds_that_never_reach_it_leave_it_open():
    found = sweep(lambda d, seed: 0.1 * (seed + 1), lambda seed: 0.2, [10, 20], [0, 1])
    assert found.by_seed == (None, 10.0)
    assert found.dimension is None and found.interval is None
    assert "above 20" in found.finding and "1 of 2 seeds" in found.finding


def test_the_interval_is_students_over_log_d():
    found = IntrinsicDimension((10, 1000), (0, 1), ((0.0, 0.9), (0.9, 0.9)), (1.0, 1.0))
    assert found.by_seed == (pytest.approx(1000), 10.0)
    assert found.dimension == pytest.approx(100)
    low, high = found.interval or (0.0, 0.0)
    assert low * high == pytest.approx(100**2)
    assert high / 100 == pytest.approx(10 ** (12.706204736 * 2**0.5 / 2**0.5), rel=1e-6)


@pytest.mark.parametrize("dims, seeds", [([10], [0]), ([20, 10], [0]), ([0, 10], [0]), ([10, 20], [])])
def test_sweeps_that_cannot_be_read_are_refused(dims, seeds):
    with pytest.raises(dt.DeltaTuneError, match="ascending"):
        sweep(lambda d, seed: 1.0, lambda seed: 1.0, dims, seeds)


def test_a_score_of_full_tuning_that_gives_no_threshold_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="above 0"):
        sweep(lambda d, seed: 1.0, lambda seed: -0.5, [1, 2], [0])


def test_a_sweep_of_ordinary_runs(tmp_path):
    from deltatune.tuning import Recipe, Run

    recipe = Recipe(steps=2, batch=2, eval_every=2, dev_limit=4, test=False, checkpoint_every=0)
    run = Run("Full()", "pebble", "sentiment", recipe)
    found = sweep_runs(run, [5, 20], [0], tmp_path, family=lambda d: dt.DID(dim=d))
    assert len(list(tmp_path.glob("*/result.json"))) == 3
    assert found == sweep_runs(run, [5, 20], [0], tmp_path, family=lambda d: dt.DID(dim=d)), "nothing is done twice"
    with pytest.raises(dt.DeltaTuneError, match="eval_every"):
        sweep_runs(Run("Full()", "pebble", "sentiment", Recipe(eval_every=0)), [5, 20], [0], tmp_path)
