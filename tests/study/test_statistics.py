"""The statistics against numbers worked out by hand and against scipy's own functions."""

from __future__ import annotations

import math

import numpy
import pytest
from scipy import stats

from deltatune.study.statistics import adjust, difference, item_error, ranks, summary, wilcoxon


def test_summary_is_mean_sample_deviation_and_t_interval() -> None:
    found = summary([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2 degrees of freedom), from a table
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_one_value_has_no_spread_and_equal_values_have_none() -> None:
    alone = summary([5.0])
    assert (alone.mean, alone.sd, alone.low, alone.high) == (5.0, None, None, None)
    same = summary([5.0, 5.0])
    assert (same.sd, same.low, same.high) == (0.0, 5.0, 5.0)
    with pytest.raises(ValueError, match="at least one"):
        summary([])


def test_wilcoxon_gives_the_exact_p_of_few_tasks() -> None:
    # All n differences on one side: 2 of the 2**n sign patterns are as extreme.
    assert wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 2**5)
    # One of rank 1 on the other side: patterns with rank sum <= 1 on either side, 2 * 2 of 32.
    assert wilcoxon([-1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(4 / 2**5)
    assert wilcoxon([0.0, 0.0, 0.0]) is None


def test_adjusted_p_values_are_benjamini_and_hochberg_s() -> None:
    # p_(i) * m / i, made monotone from the largest down.
    assert adjust([0.01, 0.04, 0.03, None]) == [pytest.approx(0.03), pytest.approx(0.04), pytest.approx(0.04), None]
    assert adjust([None]) == [None]


def test_item_error_is_the_standard_error_of_the_mean() -> None:
    noise = numpy.random.default_rng(1).normal(3, 20, size=(2, 400))
    exact = math.sqrt(sum(row.var() / row.size for row in noise)) / 2
    assert item_error(noise.tolist()) == pytest.approx(exact, rel=0.1)
    assert item_error([[0.0] * 50]) == 0.0
    assert item_error([]) is None


def test_difference_adds_the_variance_of_seeds_and_of_items() -> None:
    a, b = [[80.0, 82.0], [60.0, 62.0]], [[70.0, 72.0], [50.0, 52.0]]
    seeds_only = difference(a, b)
    # Pooled variance 2 of each method, two seeds, two tasks: (2/2 + 2/2) * 2 tasks / 2**2 = 1; 4 degrees of freedom.
    half = stats.t.ppf(0.975, 4)
    assert (seeds_only.mean, seeds_only.low, seeds_only.high) == (
        10.0,
        pytest.approx(10 - half),
        pytest.approx(10 + half),
    )
    items = [[0.0, 20.0] * 50, [0.0, 20.0] * 50]
    both = difference(a, b, items)
    error = item_error(items) or 0.0
    assert error == pytest.approx(math.sqrt(2 * 100 / 100) / 2, rel=0.1)
    # Welch and Satterthwaite: each method has variance 1/2 with 2 degrees of freedom, the items have no limit.
    degrees = (1 + error**2) ** 2 / (0.5**2 / 2 + 0.5**2 / 2)
    assert both.high == pytest.approx(10 + stats.t.ppf(0.975, degrees) * math.sqrt(1 + error**2))
    assert not seeds_only.within_noise and not both.within_noise


def test_difference_of_one_task_is_welch_s_t_test() -> None:
    a, b = [80.0, 84.0, 81.0], [70.0, 71.0]
    found, welch = difference([a], [b]), stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(welch.low), pytest.approx(welch.high))


def test_a_method_with_one_seed_is_taken_to_vary_as_the_other() -> None:
    found = difference([[80.0]], [[70.0, 74.0]])
    # Variance 8 for both: 8/1 + 8/2 = 12; degrees of freedom 12^2 / (8^2 + 4^2), each from one.
    half = stats.t.ppf(0.975, 144 / 80) * math.sqrt(12)
    assert (found.mean, found.high) == (8.0, pytest.approx(8 + half))


def test_difference_without_any_known_spread_claims_nothing() -> None:
    found = difference([[80.0], [60.0]], [[70.0], [50.0]])
    assert (found.mean, found.low, found.high) == (10.0, None, None)
    assert found.within_noise
    items = [[0.0, 20.0] * 50]
    assert difference([[80.0]], [[70.0]], items).low == pytest.approx(10 - 1.96 * (item_error(items) or 0.0), abs=0.01)


def test_ranks_friedman_and_critical_difference() -> None:
    scores = [[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [3.0, 2.0, 2.0], [9.0, 8.0, 7.0]]
    found = ranks(scores)
    assert found.by_task[2] == (1.0, 2.5, 2.5)
    assert found.mean == (1.0, 2.375, 2.625)
    assert found.p == pytest.approx(stats.friedmanchisquare(*numpy.array(scores).T).pvalue)
    # q(0.05, 3 methods) = 2.343 in Demsar's table 5(a)
    assert found.critical == pytest.approx(2.343 * math.sqrt(3 * 4 / (6 * 4)), abs=1e-3)


def test_ranks_of_two_methods_or_one_task_have_no_test() -> None:
    assert ranks([[1.0, 2.0], [1.0, 2.0]]).p is None
    assert ranks([[1.0, 2.0, 3.0]]).critical is None
    assert ranks([[1.0, 1.0, 1.0]] * 3).p == 1.0
    with pytest.raises(ValueError, match="at least one task"):
        ranks([])
