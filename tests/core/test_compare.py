"""Distances and subspace angles of two deltas, against numpy and scipy on the changes in full."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

import deltatune as dt
from deltatune.core.compare import Distance
from deltatune.core.subspace import Dense, Product, angles, spans
from tests import tiny
from tests.core.dense import BOTH, FIRST, dense, made
from tests.laws.cases import busy, fresh


@pytest.fixture(scope="module")
def model():
    return tiny.plain()


def basis(seed, rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_scipy(a, b):
    return np.sort(scipy.linalg.subspace_angles(a.numpy(), b.numpy()))


@pytest.mark.parametrize("ranks", [(1, 1), (3, 3), (2, 5), (5, 2), (10, 10)])
@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-7])
def test_the_angles_are_those_of_scipy_however_small(ranks, apart):
    a = basis(0, 24, ranks[0])
    b = torch.cat([a, basis(1, 24, ranks[1])], 1)[:, : ranks[1]] + apart * basis(2, 24, ranks[1])
    ours = angles(torch.linalg.qr(a)[0], torch.linalg.qr(b)[0])
    assert len(ours) == min(ranks)
    np.testing.assert_allclose(ours, by_scipy(a, b), rtol=1e-7, atol=1e-14)


def test_spaces_that_have_to_meet_and_empty_ones_have_no_angles():
    q = torch.linalg.qr(basis(0, 8, 8))[0]
    assert angles(q[:, :5], q[:, 3:]) == () and angles(q[:, :0], q) == ()
    assert angles(q[:, :4], q[:, 4:]) == pytest.approx([np.pi / 2] * 4)


def test_a_product_is_its_change_in_full():
    one, two = (Product(basis(i, 12, 3), basis(i + 1, 3, 9)) for i in (0, 2))
    full = [Dense(p.B @ p.A) for p in (one, two)]
    assert one.norm == pytest.approx(full[0].norm)
    assert one.minus(two).norm == pytest.approx(full[0].minus(full[1]).norm)
    assert one.minus(one).norm < 1e-13 * one.norm
    for ours, theirs in zip(spans(one.svd()), spans(full[0].svd()), strict=True):
        torch.testing.assert_close(ours @ ours.mT, theirs @ theirs.mT)
    assert spans(Product(torch.zeros(4, 2).double(), basis(0, 2, 5)).svd())[0].shape == (4, 0)
    assert spans(one.plus(one).svd())[0].shape == (12, 3), "a sum has the rank of what it spans"


def assert_dense(found, a, b):
    """Compare with the changes in full, which name their parameters."""
    none = np.zeros(())
    for name in a.keys() | b.keys():
        distance = found.get(name) or found[name.removesuffix(".weight")]
        x, y = a.get(name, none), b.get(name, none)
        assert distance.distance == pytest.approx(np.linalg.norm(x - y), rel=1e-6)
        assert distance.norms == pytest.approx((np.linalg.norm(x), np.linalg.norm(y)), rel=1e-6)
        if x.any() and y.any():
            assert distance.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), abs=1e-6)
        for ours, turn in ((distance.outputs, lambda m: m), (distance.inputs, np.transpose)):
            if distance.ranks and sum(distance.ranks) <= turn(x).shape[0]:
                assert_angles(ours, turn(x), turn(y), distance.ranks)
            else:
                assert ours == ()


def assert_angles(ours, x, y, ranks):
    spanned = [np.linalg.svd(m)[0][:, :rank] for m, rank in zip((x, y), ranks, strict=True)]
    np.testing.assert_allclose(ours, np.sort(scipy.linalg.subspace_angles(*spanned)), atol=1e-6)
    assert len(ours) == min(ranks)


LORAS = [
    (dt.LoRA(rank=4), dt.LoRA(rank=4), BOTH),
    (dt.LoRA(rank=2, alpha=3.0), dt.LoRA(rank=5), BOTH),
    (dt.LoRA(rank=3), dt.LoRA(rank=3), FIRST),
    (dt.LoRA(rank=2, init=dt.PiSSA()), dt.LoRA(rank=3), BOTH),
]


@pytest.mark.parametrize(("one", "two", "where"), LORAS, ids=str)
def test_loras_need_no_backbone_and_agree_with_the_changes_in_full(model, one, two, where):
    a, b = made(model, one, 1, where), made(model, two, 2)
    found = dt.compare(a, b)
    assert found.by == "changes"
    assert_dense(found.modules, dense(model, a), dense(model, b))
    whole = [np.concatenate([c.ravel() for c in dense(model, w).values()]) for w in (a, b)]
    assert found.total.norms == pytest.approx([np.linalg.norm(x) for x in whole], rel=1e-6)


def test_two_loras_at_one_place_add_up(model):
    a, b = made(model, dt.LoRA(rank=2), 1), made(model, dt.LoRA(rank=3), 2)
    found = dt.compare(dt.join(model, a, b), b)
    alone = dense(model, a)
    for name, distance in found.modules.items():
        assert distance.distance == pytest.approx(np.linalg.norm(alone[f"{name}.weight"]), rel=1e-6)
        assert distance.ranks == (5, 3) and distance.outputs == pytest.approx([0, 0, 0], abs=1e-6)


UNLIKE = [
    (dt.LoRA(rank=3), dt.VeRA(rank=4), FIRST), (dt.LoRA(rank=3), dt.Full(), BOTH), (dt.LoKr(factor=4), dt.BitFit(), BOTH),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two", "where"), UNLIKE, ids=str)
def test_unlike_deltas_are_compared_on_their_backbone(model, one, two, where):
    a, b = made(model, one, 1, where), made(model, two, 2, where)
    found = dt.compare(a, b, model)
    assert found.by == "changes"
    assert_dense(found.modules, dense(model, a), dense(model, b))
    with pytest.raises(dt.DeltaTuneError, match="are unlike.*name the backbone"):
        dt.compare(a, b)


def test_a_packed_weight_stored_the_other_way_round_has_the_angles_of_its_roles():
    gpt2 = tiny.gpt2()
    a, b = (busy(fresh(dt.LoRA(rank=2).at("attn.v"), gpt2), seed) for seed in (1, 2))
    by_factors, other = dt.compare(a, b).modules, dt.Weights(dt.Delta((*b.delta.terms,)), b.tensors, b.backbone)
    full = dt.compare(a, dt.to_full(gpt2, other, tolerance=1)[0], gpt2).modules
    for name, distance in by_factors.items():
        same = full[f"{name.removesuffix('[v]')}.weight"]
        assert same.distance == pytest.approx(distance.distance, rel=1e-5)
        assert name.endswith("c_attn[v]") and distance.ranks == (2, 2)


def test_deltas_that_no_weight_expresses_are_compared_by_their_leaves():
    llama = tiny.llama()
    a, b = (busy(fresh(dt.Adapter(size=4), llama), seed) for seed in (1, 2))
    found = dt.compare(a, b)
    assert found.by == "leaves" and found.modules.keys() == a.tensors.keys()
    for name, distance in found.modules.items():
        assert distance.distance == pytest.approx(float((a.tensors[name] - b.tensors[name]).double().norm()), rel=1e-6)
    assert dt.compare(a, a, llama).total == Distance(0.0, (found.total.norms[0],) * 2)
    with pytest.raises(dt.DeltaTuneError, match="Adapter.* has no change of a weight"):
        dt.compare(a, fresh(dt.LoRA(rank=2), llama), llama)


def test_what_only_one_has_is_as_far_as_it_is_large(model):
    a, b = made(model, dt.LoRA(rank=2), 1), made(model, dt.LoRA(rank=2), 2, FIRST)
    for name, distance in dt.compare(a, b).modules.items():
        if "second" in name:
            assert distance.distance == distance.norms[0] > 0 == distance.norms[1]
            assert distance.relative == 1 and distance.cosine is None


def test_deltas_of_different_backbones_are_refused(model):
    with pytest.raises(dt.DeltaTuneError, match="made for another backbone"):
        dt.compare(made(model, dt.LoRA(rank=2)), dt.init(dt.LoRA(rank=2), tiny.llama()))


@pytest.mark.parametrize(("change", "said"), [
    (lambda name: name.replace(".A", ".C"), "hold B, C of LoRA.*at 'blocks.0.first'"),
    (lambda name: name.replace("0.", "7.", 1), "belongs to term 7"),
    (lambda name: "stray", "no name of the form term.address.leaf"),
])  # fmt: skip
def test_tensors_that_are_no_loras_are_named(model, change, said):
    a = made(model, dt.LoRA(rank=2), 1, FIRST)
    name = sorted(a.tensors)[0]
    b = replace(a, tensors={change(n) if n == name else n: t for n, t in a.tensors.items()})
    with pytest.raises(dt.DeltaTuneError, match=said):
        dt.compare(a, b)
