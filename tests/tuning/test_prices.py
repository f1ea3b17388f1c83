"""Prices: each call of a step is one that runs, counted as often as the step makes it, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.core.products import MATMUL
from deltatune.tuning.encode import Row
from deltatune.tuning.forecast import longest
from deltatune.tuning.ledger import Shape, ledger
from deltatune.tuning.log import Longest
from deltatune.tuning.prices import LARGEST, Prices, made, prices, timed
from deltatune.tuning.rates import Rates
from deltatune.tuning.recipe import Recipe
from deltatune.tuning.tally import Like, Work, tally
from deltatune.tuning.widths import Widths
from tests import tiny

CPU = torch.device("cpu")
SHAPE = Shape(3, 12, 5)
DELTAS = [dt.LoRA(rank=4), dt.Adapter(size=4), dt.PrefixTuning(length=3), dt.DoRA(rank=2), dt.Full()]


def like(t: torch.Tensor) -> Like:
    return Like(tuple(t.shape), tuple(t.stride()), t.dtype, t.device)


@pytest.mark.parametrize(
    "t",
    [
        torch.ones(3, 4).T,
        torch.ones(2, 1).expand(2, 5),
        torch.ones(4, 6)[:, ::2],
        torch.ones(0, 3),
        torch.tensor(1.0),
        torch.ones(3, dtype=torch.long),
        torch.ones(2, 2, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_what_stands_for_a_tensor_looks_like_it(t: torch.Tensor) -> None:
    assert like(made(like(t))) == like(t)
    assert made(like(t)).untyped_storage().nbytes() == like(t).bytes <= t.untyped_storage().nbytes()


class Counting(Prices):
    """Prices that are all 1, once they are found."""

    def price(self, work: Work) -> float:
        super().price(work)
        return 1.0


@pytest.mark.parametrize("delta", DELTAS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_every_call_of_a_step_runs(name: str, precision: str, delta: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(prices: Prices) -> Rates:
        raise AssertionError("a call could not be tried")

    monkeypatch.setattr(Prices, "rates", property(refused))
    found, seen = Counting(CPU), list[Work]()

    def more_than_one_each(work: Iterable[Work]) -> float:
        seen.extend(work)
        return found.seconds(seen) - len(seen)

    state, said = torch.get_rng_state(), MATMUL.fp32_precision
    one = ledger(tiny.FAMILIES[name](), delta, SHAPE, Recipe(precision=precision), price=more_than_one_each)
    assert one.seconds == 0 and found.found and seen
    assert all(price > 0 for price in found.found.values())
    assert torch.equal(torch.get_rng_state(), state) and MATMUL.fp32_precision == said


def test_what_is_too_large_or_cannot_be_computed_has_the_price_of_a_roofline() -> None:
    with tally() as counted:
        pivots = torch.empty(8, dtype=torch.int32)  # places from 1 on
        torch.linalg.lu_solve(torch.empty(8, 8), pivots, torch.empty(8, 1))
        torch.empty(8).neg()
    solved, small = (one for one in counted.work if one.call is not torch.ops.aten.empty.memory_format)
    huge = replace(small, given=(Like((LARGEST,), (1,), torch.float32, CPU),))
    found = Prices(CPU)
    found.__dict__["rates"] = Rates(1e6, 1e6)
    assert found.price(solved) == solved.bytes / 1e6 and found.price(huge) == huge.bytes / 1e6 != found.price(small)


def test_what_trusts_the_bytes_of_another_call_is_not_tried() -> None:
    delta = dt.Reparam(
        dt.PromptTuning(length=3), dt.LSTMEncoder(hidden=8)
    )  # a made-up workspace of it ends the process
    found = Prices(CPU)
    found.__dict__["rates"] = Rates(1e30, 1e30)
    assert (ledger(tiny.t5(), delta, SHAPE, price=found.seconds).seconds or 0) > 0
    backward = [work for work in found.found if "rnn_layer_backward" in str(work.call)]
    assert backward and all(found.found[work] == found.rates.bound(work) for work in backward)


def test_overhead_is_added_to_each_call() -> None:
    with tally() as counted:
        x = torch.empty(4)
        for _ in range(5):
            x = x + 1
    found = Prices(CPU)
    alone = found.seconds(counted.work)
    found.overhead = 2.0
    assert found.seconds(counted.work) - alone == pytest.approx(2.0 * len(counted.work))
    assert 0 <= prices(CPU).overhead < 0.01


def test_a_call_that_takes_long_is_made_once() -> None:
    import time

    calls = []

    def call(seconds: float) -> None:
        calls.append(seconds)
        time.sleep(seconds)

    assert timed(lambda: call(0.06), CPU) >= 0.06 and len(calls) == 1
    assert timed(lambda: call(0.001), CPU) < 0.06 and len(calls) == 5


def test_a_step_on_the_longest_batches_is_told_by_those_alone() -> None:
    rows = [Row((1,) * length, (1, 1)) for length in (4, 9, 5, 10, 3, 2, 8, 7)]
    recipe = Recipe(steps=6, batch=1)
    shape, alike = longest(rows, recipe, 0, Widths((5, 10), (2,)))
    exact, one = longest(rows, recipe, 0, Widths())
    assert replace(shape, widths=1) == exact and shape.widths == 2 and len(one) == 1 and one < alike
    steps = [{"step": step, "loss": 1.0, "seconds": float(step)} for step in range(1, 7)]
    (number,) = one
    assert Longest(2.0, one).beside(steps) == {"planned": 2.0, "measured": float(number)}
    assert Longest(None, frozenset()).beside(steps) == {"planned": None, "measured": None}
