"""Diff pruning against the paper's formulas, written out number by number, and its two phases."""

from __future__ import annotations

import math

import pytest
import torch

import deltatune as dt
from deltatune.core.method import Bag
from deltatune.methods.specification.diff_pruning import prune
from tests import tiny
from tests.laws.cases import busy, output

LOW, HIGH = -1.5, 1.5
PLACE = "path:blocks.*.{first,second}"


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gate(alpha, u):
    """Return the stretched and cut hard-concrete gate of one entry (Guo et al., 2021, equation 4)."""
    s = sigmoid(math.log(u) - math.log(1 - u) + alpha)
    return min(1.0, max(0.0, s * (HIGH - LOW) + LOW))


def bag(structured, seed=0):
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(3, 4, generator=g, dtype=torch.float64) * 0.9 + 0.05
    p = {"w": torch.randn(3, 4, generator=g, dtype=torch.float64), "noise": torch.logit(u)}
    p["alpha"] = torch.randn(3, 4, generator=g, dtype=torch.float64) * 2
    own = torch.tensor([0.4], dtype=torch.float64)
    if structured:
        p |= {"alpha_tensor": torch.tensor([0.7], dtype=torch.float64), "noise_tensor": torch.logit(own)}
    return Bag(p), u, own.item()


@pytest.mark.parametrize("structured", [False, True])
def test_the_value_and_the_penalty_are_the_papers(structured):
    method = dt.StructuredDiffPruning(cost=0.3) if structured else dt.DiffPruning(cost=0.3)
    p, u, own = bag(structured)
    theta = torch.arange(12, dtype=torch.float64).view(3, 4)
    expected, open_share = theta.clone(), 0.0
    for i in range(3):
        for j in range(4):
            z, P = gate(p.alpha[i, j].item(), u[i, j].item()), sigmoid(p.alpha[i, j].item() - math.log(-LOW / HIGH))
            if structured:
                z, P = z * gate(0.7, own), P * sigmoid(0.7 - math.log(-LOW / HIGH))
            expected[i, j] += z * p.w[i, j]
            open_share += P
    assert 0 < (expected == theta).sum() < 12  # some gates are shut
    torch.testing.assert_close(method.value(p, theta), expected, rtol=0, atol=1e-12)
    assert method.penalty(p).item() == pytest.approx(0.3 * open_share, abs=1e-12)


def test_the_gradients_are_those_of_the_authors_chain_rule():
    p, _, _ = bag(False)
    p.w.requires_grad_(True)
    p.alpha.requires_grad_(True)
    g = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    method = dt.DiffPruning()
    (method.value(p, torch.zeros(3, 4, dtype=torch.float64)) * g).sum().backward()
    s = torch.sigmoid(p.noise + p.alpha.detach())
    wide = s * (HIGH - LOW) + LOW
    inside = ((wide > 0) & (wide < 1)).double()
    torch.testing.assert_close(p.w.grad, g * wide.clamp(0, 1))
    torch.testing.assert_close(p.alpha.grad, g * p.w.detach() * inside * (HIGH - LOW) * s * (1 - s))


def test_training_draws_noise_and_evaluation_uses_u_one_half():
    model = tiny.plain()
    weights = busy(dt.init(dt.DiffPruning().at(PLACE), model))
    assert set(weights.fixed) == set()
    with dt.attach(model, weights) as a:
        assert torch.equal(output(model), output(model))
        assert {n.rpartition(".")[2] for n, _ in a.named_parameters()} == {"w", "alpha"}
    p = Bag({"noise": torch.zeros(1000)})
    drawn = dt.DiffPruning().draw(p, torch.Generator().manual_seed(3))["noise"]
    again = dt.DiffPruning().draw(p, torch.Generator().manual_seed(3))["noise"]
    assert torch.equal(drawn, again)
    u = torch.sigmoid(drawn)
    assert u.min() >= 0.99e-4 and u.max() <= 1 - 0.99e-4 and abs(u.mean() - 0.5) < 0.03
    assert abs(u.std() - 12**-0.5) < 0.02


@pytest.mark.parametrize(("method", "extra"), [(dt.DiffPruning(), 0), (dt.StructuredDiffPruning(), 4)])
def test_phase_one_trains_two_numbers_a_parameter(method, extra):
    model = tiny.plain()
    own = 2 * (32 * 48 + 48 + 48 * 32 + 32)
    table = dt.sites(model, method.at(PLACE))
    assert table.parameters == 2 * own + 2 * extra
    rates = {name.rpartition(".")[2]: leaf.rate for name, leaf in table.tensors.items() if leaf.trained}
    assert rates["alpha"] / rates["w"] == 0.1 / 1e-5


@torch.no_grad()
def test_prune_keeps_the_largest_changes_of_all_tensors_together():
    model, share = tiny.plain(), 0.01
    weights = busy(dt.init(dt.StructuredDiffPruning(alpha=0.5).at(PLACE), model), size=0.3)
    pruned = prune(model, weights, share)
    changes = {}
    with dt.merge_(model, weights):
        dense = {n: p.clone() for n, p in model.named_parameters()}
    for name, tensor in model.named_parameters():
        changes[name] = dense[name] - tensor
    k = round(share * sum(t.numel() for n, t in changes.items() if n.startswith("blocks") and "scale" not in n))
    assert pruned.count == k == sum(t.numel() for t in pruned.fixed.values())
    least = torch.cat([c.abs().flatten() for c in changes.values()]).topk(k).values[-1]
    with dt.merge_(model, pruned):
        sparse = {n: p.clone() for n, p in model.named_parameters()}
    for name, tensor in model.named_parameters():
        kept = torch.where(changes[name].abs() >= least * (1 - 1e-5), changes[name], torch.zeros(()))
        torch.testing.assert_close(sparse[name] - tensor, kept, rtol=0, atol=1e-6)


def test_phase_two_trains_only_the_entries_that_were_kept(tmp_path):
    model = tiny.plain()
    pruned = prune(model, busy(dt.init(dt.DiffPruning().at(PLACE), model)), 0.01)
    pruned.write(tmp_path)
    back = dt.Weights.read(tmp_path)
    assert back.delta == pruned.delta
    with dt.attach(model, back) as a:
        assert sum(p.numel() for p in a.parameters()) == pruned.count
        output(model).square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in a.parameters() if p.numel() > 3)
        assert all(torch.equal(t, pruned.fixed[n]) for n, t in a.weights.fixed.items())


def test_what_makes_no_sense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match=r"low=0\.0.*write low < 0 and high > 1"):
        dt.DiffPruning(low=0.0)
    with pytest.raises(dt.DeltaTuneError, match=r"share=0.*above 0 and up to 1"):
        dt.FixedMask(share=0.0)
    model = tiny.plain()
    with pytest.raises(dt.DeltaTuneError, match=r"prune needs the weights of DiffPruning alone; these hold LoRA"):
        prune(model, dt.init(dt.LoRA().at(PLACE), model))
