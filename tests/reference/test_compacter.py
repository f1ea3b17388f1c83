"""Compacter, its full-rank form and the low-rank adapter against sums of torch.kron and dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import deltatune as dt
from deltatune.core.leaf import XavierUniform
from deltatune.methods.addition.compacter import compacter, compacter_pp
from tests import tiny
from tests.reference.compare import TOLERANCE, moved, scores

N = 4


def leaves_at(weights, address):
    """Return {leaf: tensor} at one site, shared ones included."""
    return {
        n.rpartition(".")[2]: t for n, t in weights.tensors.items() if n.split(".", 1)[1].startswith((address, "*"))
    }


def dense(method, p):
    """Return the down and up matrices as the paper defines them, rows times matrix."""
    if isinstance(method, dt.LowRankAdapter):
        return p["D2"].T @ p["D1"].T, p["U2"].T @ p["U1"].T
    if isinstance(method, dt.Compacter):
        inner = [(p["Ds"][i] @ p["Dt"][i], p["Us"][i] @ p["Ut"][i]) for i in range(N)]
    else:
        inner = list(zip(p["D"], p["U"], strict=True))
    return tuple(sum(torch.kron(p["A"][i], pair[side]) for i, pair in enumerate(inner)) for side in (0, 1))


METHODS = [dt.Compacter(size=8, rank=2), dt.Compacter(), dt.PHMAdapter(size=8), dt.LowRankAdapter(size=8, rank=2)]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_adapter_is_one_with_the_dense_matrices(method):
    model, weights = moved("bert", method)
    reference, paths = tiny.bert(), [p.site.path for p in dt.sites(model, weights.delta).placements]
    for path in paths:
        p = leaves_at(weights, path)
        D, U = dense(method, p)
        assert D.shape == (32, method.size) and U.shape == (method.size, 32)

        def change(module, args, h, D=D, U=U, p=p):
            return h + F.gelu(h @ D + p["d"], approximate="tanh") @ U + p["u"]

        reference.get_submodule(path).register_forward_hook(change)
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert len(paths) == 4
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)


def test_the_counts_are_the_papers():
    model, d, m = tiny.bert(), 32, 24
    site, both = 2 * (d + m) + m + d, 2 * 2
    assert dt.sites(model, compacter()).parameters == N**3 + both * site
    assert dt.sites(model, compacter_pp()).parameters == N**3 + 2 * site
    assert dt.sites(model, dt.PHMAdapter()).parameters == N**3 + both * (2 * d * m // N + m + d)
    assert dt.sites(model, dt.LowRankAdapter(rank=3)).parameters == both * (3 * 2 * (d + m) + m + d)
    assert {p.site.role for p in dt.sites(model, compacter_pp()).placements} == {"ffn.down"}


def test_all_sites_share_the_rule_and_start_as_the_paper_says():
    weights = dt.init(dt.Compacter(size=8), tiny.bert())
    rules = {n: t for n, t in weights.tensors.items() if n.endswith(".A")}
    assert list(rules) == ["0.*.A"] and rules["0.*.A"].shape == (N, N, N)
    assert rules["0.*.A"].std() == pytest.approx(1e-4, rel=0.3)
    Ds = next(t for n, t in weights.tensors.items() if n.endswith(".Ds"))
    bound = (6 / (32 / N + 1)) ** 0.5
    assert 0.8 * bound < Ds.abs().max() <= bound
    near = dt.init(dt.LowRankAdapter(up=XavierUniform()), tiny.bert())
    assert all(t.abs().max() > 0 for n, t in near.tensors.items() if n.endswith("U1"))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match=r"size=10, n=4.*write size=8 or size=12"):
        dt.Compacter(size=10)
    with pytest.raises(dt.DeltaTuneError, match=r"n=5\) does not divide the width 32 of 'bert.*write n=4 or 8"):
        dt.sites(tiny.bert(), dt.Compacter(size=10, n=5))
    with pytest.raises(dt.DeltaTuneError, match=r"Compacter\(rank=0\)"):
        dt.Compacter(rank=0)
    with pytest.raises(dt.DeltaTuneError, match=r"rank=9\) exceeds its size=8"):
        dt.LowRankAdapter(size=8, rank=9)
