"""Conversion of deltas: to LoRA with the error that the singular values say, and to new values."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch

import deltatune as dt
from deltatune.core.convert import Report, changes, least_rank, to_full, to_lora
from tests import tiny
from tests.core.dense import BOTH, FIRST, dense, made, same
from tests.laws.cases import busy, fresh, output

SECOND = "path:blocks.0.second"


@pytest.fixture(scope="module")
def model():
    return tiny.plain()


# a method, and the rank of its change: of reflections their number, of a Hadamard product the product of the ranks
EXACT = [(dt.HRA(rank=4), 4), (dt.LoHa(rank=3), 9), (dt.LoKr(rank=1, factor=4), 4), (dt.KronA(), 32)]
EXACT += [(dt.VeRA(rank=6), 6), (dt.DEFT(rank=2), 4), (dt.LoRA(rank=5), 5)]


@pytest.mark.parametrize(("method", "rank"), EXACT, ids=str)
def test_a_change_of_rank_r_is_a_lora_of_rank_r(model, method, rank):
    weights = made(model, method, where=FIRST)
    wanted = dense(model, weights)
    enough = max(int(np.linalg.matrix_rank(change, tol=1e-9)) for change in wanted.values())
    assert enough <= rank
    result, report = to_lora(model, weights, enough)
    assert result.delta == dt.LoRA(rank=enough, alpha=float(enough)).at(FIRST)
    same(dense(model, result), wanted)
    assert report.error < 1e-6


def test_the_errors_are_the_tails_of_the_singular_values(model):
    weights = made(model, dt.LoRA(rank=6))
    result, report = to_lora(model, weights, 3, tolerance=1.0)
    assert result.delta == dt.LoRA(rank=3, alpha=3.0).at(BOTH) and report.tolerance == 1.0
    wanted, got = dense(model, weights), dense(model, result)
    assert report.errors.keys() == wanted.keys()
    for name, change in wanted.items():
        S = np.linalg.svd(change, compute_uv=False)
        tail = np.sqrt((S[3:] ** 2).sum() / (S**2).sum())
        assert report.errors[name] == pytest.approx(tail, rel=1e-5)
        assert np.linalg.norm(got[name] - change) / np.linalg.norm(change) == pytest.approx(tail, rel=1e-5)
    assert report.worst == max(report.errors, key=report.errors.get)
    assert f"{report.worst}  {report.error:.2e}" in re.sub(" +", "  ", str(report))
    factors = {n: t for n, t in result.tensors.items() if "blocks.0.first" in n}
    norms = [float(t.norm()) for t in factors.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # neither factor outweighs the other


def test_a_rank_that_loses_too_much_is_refused_with_the_worst_place_and_the_rank_that_would_do(model):
    weights = made(model, dt.LoRA(rank=6))
    _, report = to_lora(model, weights, 2, tolerance=1.0)
    with pytest.raises(dt.DeltaTuneError) as it:
        to_lora(model, weights, 2, tolerance=0.2)
    message = str(it.value)
    assert f"off by {report.error:.2g} of the exact change at {report.worst!r}, more than the tolerance 0.2" in message
    rank, place = re.search(r"rank=(\d+), which '(.*)' needs, would do", message).groups()
    assert f"{place}.weight" in report.errors and 2 < int(rank) <= 6
    assert to_lora(model, weights, int(rank), tolerance=0.2)[1].error <= 0.2
    with pytest.raises(dt.DeltaTuneError, match=f"rank={rank}, which"):
        to_lora(model, weights, int(rank) - 1, tolerance=0.2)


def test_places_too_narrow_for_the_rank_are_named():
    llama = tiny.llama()
    weights = made(llama, dt.KronA(), where="attn.{q,v}")
    with pytest.raises(
        dt.DeltaTuneError, match=r"rank=32, .* would do, but '.*v_proj' is only 16 x 32; convert such places apart"
    ):
        to_lora(llama, weights, 16)
    with pytest.raises(dt.DeltaTuneError, match=r"LoRA\(rank=20.*exceeds the dimensions"):
        to_lora(llama, weights, 20)


def test_the_least_rank_is_where_the_tail_is_small_enough():
    S = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    size = S.norm()
    for rank in range(1, 4):
        tail = float(S[rank:].norm() / size)
        assert least_rank(S, tail * 1.001) == rank
        assert least_rank(S, tail * 0.999) == rank + 1
    assert least_rank(torch.zeros(3), 1e-3) == 1


def test_changed_biases_come_along_and_changed_scales_are_refused(model):
    weights = made(model, dt.SSF(), where=SECOND)
    result, report = to_lora(model, weights, 32)
    assert str(result.delta) == f'LoRA(rank=32, alpha=32.0).at("{SECOND}") + BitFit().at("{SECOND}")'
    same(dense(model, result), dense(model, weights))
    assert set(report.errors) == {"blocks.0.second.weight", "blocks.0.second.bias"}
    with pytest.raises(
        dt.DeltaTuneError, match=r"'blocks\.0\.scale\.weight' changes too, .* belongs to a norm.*to_full"
    ):
        to_lora(model, made(model, dt.LNTuning(), where="path:blocks.0.scale"), 2)
    with pytest.raises(dt.DeltaTuneError, match="no change of a weight"):
        to_lora(model, made(model, dt.Adapter(size=4), where=FIRST), 2)


def test_roles_that_share_a_module_keep_a_lora_each():
    gpt2 = tiny.gpt2()
    weights = made(gpt2, dt.LoHa(rank=2), where="attn.{q,v}")
    result, _ = to_lora(gpt2, weights, 4)
    assert result.delta == dt.LoRA(rank=4, alpha=4.0).at("attn.{q,v}")
    same(dense(gpt2, result), dense(gpt2, weights))
    with pytest.raises(dt.DeltaTuneError, match=r"rank=4, which '.*c_attn\[(q|v)\]' needs, would do"):
        to_lora(gpt2, weights, 3)
    packed = "path:transformer.h.*.attn.c_attn"
    over = busy(fresh(dt.LoHa(rank=2).at("attn.q") + dt.LoRA(rank=2).at(packed), gpt2))
    result, _ = to_lora(gpt2, over, 6)  # one LoRA for the whole module, and none beside it for its part
    assert all(site.site.part is None for site in dt.sites(gpt2, result.delta).placements)
    same(dense(gpt2, result), dense(gpt2, over))


@pytest.mark.parametrize("where", ["embed", "{embed,head}", "path:model.layers.0.self_attn.q_proj:in"])
def test_tables_and_inputs_become_loras_at_the_module(where):
    qwen = tiny.qwen2()
    weights = made(qwen, dt.HiRA(rank=2), where=where)
    result, _ = to_lora(qwen, weights, 32)
    same(dense(qwen, result), dense(qwen, weights))
    both = made(qwen, dt.IA3(), where="{attn.q:in,attn.q:out}")
    result, report = to_lora(qwen, both, 32)
    assert report.error < 1e-6 and all(term.where.startswith("{path:") for term in result.delta.terms)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_new_values_hold_any_change(dtype):
    model = tiny.plain().to(dtype)
    weights = busy(fresh(dt.DoRA(rank=2).at(BOTH) + dt.LNTuning().at("path:blocks.0.scale"), model))
    result, report = to_full(model, weights)
    assert result.delta.terms[0].method == dt.Full()
    exact = copy.deepcopy(model).double()
    with dt.attach(exact, weights, check=False):
        wanted = output(exact)
    with dt.attach(exact, result, check=False):
        torch.testing.assert_close(output(exact), wanted, rtol=1e-5, atol=1e-5)
    assert report.error < (1e-12 if dtype == torch.float64 else 1e-5)


def test_new_values_and_biases_where_there_were_none():
    llama = tiny.llama()
    weights = busy(dt.init(dt.BitFit().at("{attn.q,norm}") + dt.LoRA(rank=2), llama))
    result, _ = to_full(llama, weights)
    assert [type(term.method) for term in result.delta.terms] == [dt.Full, dt.BitFit]
    with torch.no_grad():
        with dt.attach(llama, weights):
            wanted = output(llama)
        with dt.attach(llama, result):
            torch.testing.assert_close(output(llama), wanted, rtol=1e-4, atol=1e-5)


def test_a_shared_parameter_gets_one_new_value_or_none():
    qwen = tiny.qwen2()
    result, _ = to_full(qwen, made(qwen, dt.TrainableTokens(tokens=(1, 2)), where="embed"))
    assert len(result.tensors) == 1
    for where in ("head", "{embed,head}"):
        with pytest.raises(dt.DeltaTuneError, match=r"is shared with .*, and they change differently.*write rank="):
            to_full(qwen, made(qwen, dt.LoRA(rank=2), where=where))


def test_a_change_below_the_rounding_of_the_value_is_refused(model):
    weights = busy(dt.init(dt.LoRA(rank=2).at(BOTH), model), size=1e-5)
    with pytest.raises(dt.DeltaTuneError, match=r"float32 values cannot hold a change this small.*write rank="):
        to_full(model, weights, tolerance=1e-4)
    assert to_lora(model, weights, 2)[1].error < 1e-6


def test_changes_leave_the_model_and_what_is_attached_alone(model):
    weights = made(model, dt.LoRA(rank=2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    alone = changes(model, weights)
    with dt.attach(model, made(model, dt.IA3(), where=FIRST)):
        beside = changes(model, weights)
        assert "blocks.0.first" in dict(model.named_modules())
    assert alone.keys() == beside.keys() and all(torch.equal(alone[n], beside[n]) for n in alone)
    assert all(change.dtype == torch.float64 for change in alone.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any("bias" in m._parameters for m in (model.blocks[0], model.table))


def test_a_backbone_without_numbers_is_refused():
    weights = made(tiny.plain(), dt.LoRA(rank=2))
    with pytest.raises(
        dt.DeltaTuneError, match=r"blocks\.0\.first\.weight is on the meta device.*load the backbone in a float"
    ):
        changes(tiny.plain().to("meta"), weights)
    rounded = tiny.plain()
    table = rounded.blocks[0].first
    table.weight = torch.nn.Parameter((table.weight * 100).to(torch.int8), requires_grad=False)
    with pytest.raises(dt.DeltaTuneError, match=r"is stored as torch\.int8"):
        changes(rounded, weights)


def test_an_empty_report_has_no_worst_place():
    empty = Report({})
    assert (empty.worst, empty.error) == ("", 0.0)
