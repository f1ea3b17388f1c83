"""Arithmetic on weights: every result is compared with dense changes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import deltatune as dt
from deltatune.core.arithmetic import combine, negate, slerp
from deltatune.core.task_vectors import dare, task_arithmetic, ties
from tests import tiny
from tests.core.dense import BOTH, FIRST, dense, made, moved, same, total
from tests.laws.cases import METHODS, busy, fresh, output, plain_place

LINEAR = ("Full", "BitFit", "IA3", "SSF", "SHiRA", "FISH", "FixedMask", "LNTuning", "C3A", "MiSS", "LoRAXS", "LoRAFA")
LINEAR += ("FourierFT", "TrainableTokens", "DiffPruning", "LoRA", "Reparam(LoRA, Subspace)")


@pytest.fixture(scope="module")
def model():
    return tiny.plain()


def test_loras_of_any_rank_and_alpha_add_up_to_one_lora_exactly(model):
    methods = [dt.LoRA(rank=2, alpha=3.0), dt.LoRA(rank=5, alpha=8.0), dt.LoRA(rank=1, alpha=0.5)]
    each = [made(model, m, seed=i) for i, m in enumerate(methods)]
    coefficients = [0.7, -1.3, 2.0]
    result, report = combine(model, each, coefficients)
    assert result.delta == dt.LoRA(rank=8, alpha=12.0).at(BOTH)
    for site in ("blocks.0.first", "blocks.1.second"):
        wanted = 0
        for c, weights, method in zip(coefficients, each, methods, strict=True):
            A, B = (weights.tensors[f"0.{site}.{leaf}"].double().numpy() for leaf in "AB")
            wanted = wanted + c * method.alpha / method.rank * B @ A
        got = dense(model, result)[f"{site}.weight"]
        assert np.linalg.norm(got - wanted) < 1e-7 * np.linalg.norm(wanted)
        off = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        assert report.errors[f"{site}.weight"] == pytest.approx(off, rel=1e-6)
    assert len(report.errors) == 4 and 0 < report.error < 1e-7


def test_what_was_combined_attaches_and_travels(model, tmp_path):
    each = [made(model, dt.LoRA(rank=2), seed=0), made(model, dt.LoRA(rank=3), seed=1)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    result, _ = combine(model, each, [0.5, 0.5])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(t.dtype == torch.float32 for t in result.tensors.values())
    result.write(tmp_path)
    exact = tiny.plain().double()
    with torch.no_grad():
        with dt.attach(exact, dt.Weights.read(tmp_path)):
            got = output(exact)
        with dt.merge_(exact, task_arithmetic(exact, each, [0.5, 0.5])[0]):
            torch.testing.assert_close(got, output(exact), rtol=0, atol=1e-6)


def test_a_lora_whose_start_is_taken_off_adds_up_too(model):
    each = [made(model, dt.LoRA(rank=2, init=dt.PiSSA()), seed=i) for i in range(2)]
    result, report = combine(model, each, [1.0, -0.5])
    assert result.delta == dt.LoRA(rank=8, alpha=64.0).at(BOTH)
    same(dense(model, result), total([dense(model, w) for w in each], [1.0, -0.5]))
    assert report.error < 1e-6


@pytest.mark.parametrize("name", LINEAR)
def test_linear_methods_combine_leaf_by_leaf(model, name):
    method = METHODS[name]
    each = [made(model, method, seed=i, where=plain_place(method)) for i in range(2)]
    result, report = combine(model, each, [0.7, -0.4])
    assert name.startswith(("LoRA", "Reparam")) or result.delta == each[0].delta
    same(dense(model, result), total([dense(model, w) for w in each], [0.7, -0.4]), rtol=1e-5)
    assert report.error < 1e-5


@pytest.mark.parametrize("name", LINEAR)
def test_a_minus_a_is_neutral_and_negation_turns_the_change(model, name):
    weights = made(model, METHODS[name], where=plain_place(METHODS[name]))
    size = {n: np.linalg.norm(change) for n, change in dense(model, weights).items()}
    result, report = combine(model, [weights, weights], [1.0, -1.0])
    assert all(np.linalg.norm(change) <= 1e-6 * size[n] for n, change in dense(model, result).items())
    assert report.error < 1e-3
    opposite, _ = negate(model, weights)
    assert opposite.delta == weights.delta or name.startswith("Reparam")
    same(dense(model, opposite), total([dense(model, weights)], [-1.0]), rtol=1e-5)


@pytest.mark.parametrize("method", [dt.HRA(rank=2), dt.LoHa(rank=2), dt.VeRA(rank=4), dt.DoRA(rank=2)], ids=str)
def test_what_is_not_linear_in_its_leaves_is_refused_with_the_way_round(model, method):
    each = [made(model, method, seed=i, where=FIRST) for i in range(2)]
    with pytest.raises(
        dt.DeltaTuneError, match=r"off by 0\.\d+ of the exact change at 'blocks\.\d\.first\.weight'"
    ) as it:
        combine(model, each, [1, 0.5])
    assert "tolerance 0.001" in str(it.value)
    assert f"not linear in the leaves of {method}" in str(it.value)
    assert "task_arithmetic(model, weights, [1.0, 0.5])" in str(it.value)
    _, report = combine(model, each, [1, 0.5], tolerance=10)
    assert 0.01 < report.error < 10 and report.worst in report.errors and report.worst in str(it.value)
    result, report = task_arithmetic(model, each, [1, 0.5])
    same(moved(dense(model, result)), total([dense(model, w) for w in each], [1, 0.5]), rtol=1e-5)
    assert f"largest error {report.error:.2e}, tolerance 0.001" in str(report)


def test_methods_that_no_weight_can_express_are_refused_by_name_and_reason():
    llama = tiny.llama()
    for method in (dt.Adapter(size=4), dt.PrefixTuning(length=3), dt.PromptTuning(length=3)):
        weights = fresh(method.at(method.where), llama)
        for compute in (combine, task_arithmetic):
            with pytest.raises(dt.DeltaTuneError) as it:
                compute(llama, [weights], [1.0])
            assert str(it.value) == f"{method} has no change of a weight to compute with: {method.breaks['merge']}."


def test_unlike_deltas_do_not_combine_but_their_changes_do(model):
    a, b = made(model, dt.LoRA(rank=2), where=FIRST), made(model, dt.HRA(rank=2), where=BOTH)
    for other in (b, made(model, dt.LoRA(rank=2), where=BOTH), made(model, dt.IA3(), where=FIRST)):
        with pytest.raises(
            dt.DeltaTuneError, match=r"are unlike, .* task_arithmetic\(model, weights, \[1\.0, -2\.0\]\)"
        ):
            combine(model, [a, other], [1, -2])
    wanted = total([dense(model, a), dense(model, b)], [1, -2])
    full, _ = task_arithmetic(model, [a, b], [1, -2])
    low, report = task_arithmetic(model, [a, b], [1, -2], rank=4)
    assert isinstance(full.delta.terms[0].method, dt.Full)
    assert low.delta.terms[0].method == dt.LoRA(rank=4, alpha=4.0)
    same(moved(dense(model, full)), wanted, rtol=1e-5)
    same(dense(model, low), wanted)
    assert report.error < 1e-6


def test_operands_that_do_not_go_together_are_refused(model):
    a = made(model, dt.LoRA(rank=20))
    with pytest.raises(dt.DeltaTuneError, match=r"ranks \[20, 20\] add up to 40, more than .*\(48 x 32\).*rank=32\)"):
        combine(model, [a, a], [1, 1])
    assert task_arithmetic(model, [a, a], [1, 1], rank=32)[0].delta.terms[0].method.rank == 32
    for weights, coefficients in (([a], [1, 2]), ([], [])):
        with pytest.raises(dt.DeltaTuneError, match="every weights needs one coefficient"):
            combine(model, weights, coefficients)
    with pytest.raises(dt.DeltaTuneError, match="a finite number; found nan"):
        ties(model, [a], [math.nan], 0.5)
    for density in (0, 1.5):
        with pytest.raises(dt.DeltaTuneError, match=f"density={density} is no share"):
            dare(model, [a], [1], density)
    sparse = [made(model, dt.SHiRA(rank=1), start=seed) for seed in (0, 1)]
    with pytest.raises(
        dt.DeltaTuneError, match=r"'index' of SHiRA\(rank=1\) at 'blocks.0.first' is not trained and not the"
    ):
        combine(model, sparse, [1, 1])
    other = tiny.plain(seed=1)
    with pytest.raises(dt.DeltaTuneError, match="with other values"):
        combine(other, [a], [1])
    assert combine(other, [a], [1], check=False)[1].error < 1e-6


def test_tolerance_is_kept_and_named(model):
    each = [made(model, dt.LoRA(rank=2), seed=i) for i in range(2)]
    with pytest.raises(dt.DeltaTuneError, match="more than the tolerance 1e-12"):
        combine(model, each, [0.7, 0.3], tolerance=1e-12)


def norm_of(change):
    return math.sqrt(sum(float((part**2).sum()) for part in change.values()))


@pytest.mark.parametrize("method", [dt.LoRA(rank=2), dt.BitFit(), dt.IA3()], ids=str)
def test_slerp_ends_at_its_operands_and_keeps_the_norm(model, method):
    a, b = (made(model, method, seed=i) for i in range(2))
    b, _ = combine(model, [b], [norm_of(dense(model, a)) / norm_of(dense(model, b))])
    for t, end in ((0, a), (1, b)):
        same(dense(model, slerp(model, a, b, t)[0]), dense(model, end), rtol=1e-5)
    half = dense(model, slerp(model, a, b, 0.5)[0])
    assert norm_of(half) == pytest.approx(norm_of(dense(model, a)), rel=1e-5)
    middle = total([dense(model, a), dense(model, b)], [0.5, 0.5])
    scale = norm_of(half) / norm_of(middle)
    assert scale > 1.01
    same(half, total([middle], [scale]), rtol=1e-5)


def test_slerp_of_parallel_and_opposite_changes(model):
    a = made(model, dt.LoRA(rank=2))
    double, opposite = combine(model, [a], [2.0])[0], negate(model, a)[0]
    same(dense(model, slerp(model, a, double, 0.25)[0]), total([dense(model, a)], [1.25]))
    with pytest.raises(dt.DeltaTuneError, match="opposite directions"):
        slerp(model, a, opposite, 0.5)
    with pytest.raises(dt.DeltaTuneError, match=r"from t=0 to t=1; found t=1\.5"):
        slerp(model, a, a, 1.5)
    nothing = replace(a, tensors={n: torch.zeros_like(t) for n, t in a.tensors.items()})
    same(dense(model, slerp(model, a, nothing, 0.25)[0]), total([dense(model, a)], [0.75]))


def test_several_terms_on_one_weight_combine_when_they_do_not_interact(model):
    delta = dt.LoRA(rank=2).at(BOTH) + dt.BitFit().at(FIRST) + dt.LoRA(rank=1).at(FIRST)
    each = [busy(dt.init(delta, model, seed=i), seed=i) for i in range(2)]
    result, _ = combine(model, each, [2.0, -1.0])
    assert [str(t.method) for t in result.delta.terms] == [
        "LoRA(rank=4, alpha=32.0)",
        "BitFit()",
        "LoRA(rank=2, alpha=32.0)",
    ]
    same(dense(model, result), total([dense(model, w) for w in each], [2.0, -1.0]))


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "llama"])
def test_packed_tied_and_missing_parameters_are_no_exception(family):
    model = getattr(tiny, family)()
    where = "{attn.{q,v},head}" if family == "qwen2" else "attn.{q,v}"
    each = [made(model, dt.LoRA(rank=r), seed=r, where=where) for r in (2, 3)]
    result, _ = combine(model, each, [0.5, 0.5])
    same(dense(model, result), total([dense(model, w) for w in each], [0.5, 0.5]))
    biases = busy(dt.init(dt.BitFit(), model))
    opposite, report = negate(model, biases)  # also where a norm has no place for a bias
    assert report.error == 0
    assert all(torch.equal(t, -biases.tensors[n]) for n, t in opposite.tensors.items())
