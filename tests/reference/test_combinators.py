"""Combinators against their formulas written out, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from tests import tiny
from tests.laws.cases import busy, output

D = 6


class Net(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def case(method, seed=0):
    """A net, weights of a method on it away from their start, its leaves, and inputs."""
    torch.manual_seed(seed)
    net = Net()
    weights = busy(dt.init(method.at("path:inner"), net), size=0.5)
    leaves = {name.removeprefix("0.inner."): tensor for name, tensor in weights.held.items()}
    return net, weights, leaves, torch.randn(3, 4, D)


@torch.no_grad()
def result(net, weights, x):
    with dt.attach(net, weights):
        return net(x)


def lora(leaves, index, x, y, alpha, rank):
    return y + alpha / rank * x @ leaves[f"{index}/A"].T @ leaves[f"{index}/B"].T


def adapter(leaves, index, h):
    hidden = torch.nn.functional.gelu(h @ leaves[f"{index}/D"].T + leaves[f"{index}/d"])
    return h + hidden @ leaves[f"{index}/U"].T + leaves[f"{index}/u"]


@torch.no_grad()
def test_fusion_is_attention_over_what_the_methods_make():
    method = dt.Fuse((dt.LoRA(rank=2, alpha=4.0), dt.LoRA(rank=1, alpha=3.0)), size=5)
    net, weights, p, x = case(method)
    y = net(x)
    z = [lora(p, 0, x, y, 4.0, 2), lora(p, 1, x, y, 3.0, 1)]
    expected = torch.empty_like(y)
    for row in range(3):
        for t in range(4):
            q = p["Q"] @ x[row, t]
            shares = torch.softmax(torch.stack([q @ (p["K"] @ each[row, t]) for each in z]), 0)
            expected[row, t] = sum(share * (p["V"] @ each[row, t]) for share, each in zip(shares, z, strict=True))
    torch.testing.assert_close(result(net, weights, x), expected, rtol=0, atol=1e-5)


def test_a_fusion_of_frozen_methods_trains_the_fusion_alone_and_keeps_the_methods():
    net = Net()
    weights = dt.init(dt.Fuse((dt.Adapter(size=2), dt.Adapter(size=3)), size=4, frozen=True).at("path:inner:out"), net)
    assert set(weights.tensors) == {"0.inner.Q", "0.inner.K", "0.inner.V"}
    assert weights.count == 4 * D + 4 * D + D * D
    assert {name.partition("/")[0] for name in weights.fixed} == {"0.inner.0", "0.inner.1"}


@torch.no_grad()
def test_a_gate_decides_for_each_token():
    net, weights, p, x = case(dt.Gate(dt.LoRA(rank=2, alpha=4.0)))
    y = net(x)
    g = torch.sigmoid(x @ p["w"].T + p["b"])
    torch.testing.assert_close(result(net, weights, x), y + g * (lora(p, 0, x, y, 4.0, 2) - y), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("top", [0, 1])
def test_a_mixture_weighs_the_changes_by_a_softmax_of_the_input(top):
    net, weights, p, x = case(
        dt.Mixture((dt.LoRA(rank=2, alpha=4.0), dt.LoRA(rank=2, alpha=4.0)), top=top, temperature=0.5)
    )
    y = net(x)
    scores = x @ p["R"].T / 0.5
    shares = nn.functional.one_hot(scores.argmax(-1), 2).float() if top else scores.softmax(-1)
    changes = [lora(p, i, x, y, 4.0, 2) - y for i in (0, 1)]
    expected = y + sum(shares[..., i, None] * change for i, change in enumerate(changes))
    torch.testing.assert_close(result(net, weights, x), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_arrow_sends_each_token_to_the_expert_that_answers_most_to_it():
    torch.manual_seed(0)
    net = Net()
    experts = []
    for i in range(3):  # each answers to one direction of the input alone
        weights = dt.init(dt.LoRA(rank=1, alpha=1.0).at("path:inner"), net)
        A, B = torch.zeros(1, D), torch.randn(D, 1)
        A[0, i] = 2.0
        experts.append(dt.Weights(weights.delta, {"0.inner.A": A, "0.inner.B": B}, weights.backbone))
    mixed = dt.arrow(net, experts, top=1)
    torch.testing.assert_close(mixed.fixed["0.inner.R"].abs(), torch.eye(D)[:3], rtol=0, atol=1e-5)
    x = torch.eye(D)[:3] * -1.5
    expected = torch.stack([result(net, expert, x[i]) for i, expert in enumerate(experts)])
    torch.testing.assert_close(result(net, mixed, x), expected, rtol=0, atol=1e-5)
    with pytest.raises(dt.DeltaTuneError, match="arrow mixes weights of one method"):
        dt.arrow(net, [dt.init(dt.Adapter().at("path:inner:out"), net)])


HELD_IN_EVERY_WAY = [dt.VeRA(rank=3), dt.LoRAXS(rank=2), dt.LoRAFA(rank=2), dt.IA3(), dt.DoRA(rank=2), dt.LoHa(rank=2)]


@torch.no_grad()
@pytest.mark.parametrize("method", HELD_IN_EVERY_WAY, ids=str)
def test_arrow_takes_what_experts_train_store_and_regenerate(method, tmp_path):
    net = case(method)[0]
    experts = [busy(dt.init(method.at("path:inner"), net, seed=seed), seed, size=0.5) for seed in (3, 4)]
    mixed = dt.arrow(net, experts, top=1)
    assert mixed.count == sum(expert.count for expert in experts)
    for i, expert in enumerate(experts):
        change = dt.merge(net, expert)["inner.weight"] - net.inner.weight
        along = mixed.fixed["0.inner.R"][i]
        torch.testing.assert_close((change @ along).norm(), torch.linalg.matrix_norm(change, 2), rtol=1e-4, atol=1e-6)
    mixed.write(tmp_path)
    x = torch.randn(32, D, generator=torch.Generator().manual_seed(1))
    picked = (x @ mixed.fixed["0.inner.R"].T).abs().argmax(-1)
    assert set(picked.tolist()) == {0, 1}
    apart = torch.stack([result(net, expert, x) for expert in experts])
    expected = apart[picked, torch.arange(len(x))]
    torch.testing.assert_close(result(net, dt.Weights.read(tmp_path), x), expected, rtol=0, atol=1e-5)


def test_arrow_refuses_experts_of_another_backbone():
    _, weights, *_ = case(dt.LoRA(rank=2))
    other = case(dt.LoRA(rank=2), seed=1)[0]
    with pytest.raises(dt.DeltaTuneError, match=r"other values .*check=False"):
        dt.arrow(other, [weights])
    assert dt.arrow(other, [weights], check=False).count == weights.count


@torch.no_grad()
def test_methods_in_a_stack_see_what_the_one_before_made():
    net, weights, p, x = case(dt.Stack((dt.Adapter(size=2), dt.Adapter(size=3))))
    torch.testing.assert_close(result(net, weights, x), adapter(p, 1, adapter(p, 0, net(x))), rtol=0, atol=1e-5)


@torch.no_grad()
def test_scale_and_average_are_linear_in_the_change():
    net, weights, p, x = case(dt.Scale(dt.LoRA(rank=2, alpha=4.0), by=-0.5))
    y = net(x)
    torch.testing.assert_close(result(net, weights, x), lora(p, 0, x, y, -2.0, 2), rtol=0, atol=1e-5)
    net, weights, p, x = case(dt.Average((dt.LoRA(rank=2, alpha=4.0), dt.LoRA(rank=3, alpha=6.0))))
    y = net(x)
    expected = (lora(p, 0, x, y, 4.0, 2) + lora(p, 1, x, y, 6.0, 3)) / 2
    torch.testing.assert_close(result(net, weights, x), expected, rtol=0, atol=1e-5)


def test_unlike_methods_and_nothing_are_refused():
    with pytest.raises(dt.DeltaTuneError, match="one interface; found LoRA"):
        dt.Average((dt.LoRA(), dt.Adapter()))
    with pytest.raises(dt.DeltaTuneError, match="combines nothing"):
        dt.Stack(())
    with pytest.raises(dt.DeltaTuneError, match="cannot combine PrefixTuning"):
        dt.Gate(dt.PrefixTuning())


@torch.no_grad()
def test_a_found_subspace_holds_the_weights_it_was_found_from():
    model, delta = tiny.llama(), dt.LoRA(rank=2)
    tasks = [busy(dt.init(delta, model, seed=i), seed=i, size=0.3) for i in range(4)]
    space = dt.subspace(tasks, dim=3)
    points = [torch.cat([t.flatten() for t in w.tensors.values()]) for w in tasks]
    W = torch.cat([space[n.partition(".")[2]][0].flatten(0, -2) for n in tasks[0].tensors])
    b = torch.cat([space[n.partition(".")[2]][1].flatten() for n in tasks[0].tensors])
    for point in points:  # four points lie in a space of three dimensions
        z = torch.linalg.lstsq(W, (point - b)[:, None]).solution
        torch.testing.assert_close((W @ z)[:, 0] + b, point, rtol=0, atol=1e-4)
    through = dt.Reparam(delta, through=dt.Subspace(dim=3, basis=dt.Found()))
    weights = dt.init(through, model, evidence={"subspace": space})
    assert weights.count == 3
    z = torch.linalg.lstsq(W, (points[2] - b)[:, None]).solution[:, 0]
    with dt.attach(model, dt.Weights(weights.delta, {"0.*.z": z}, weights.backbone, fixed=weights.fixed)):
        found = output(model)
    with dt.attach(model, tasks[2]):
        torch.testing.assert_close(found, output(model), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_unified_subspace_gives_each_task_one_z_for_every_kind_of_delta():
    model, kinds = tiny.llama(), [dt.LoRA(rank=2), dt.Adapter(size=3)]
    families = [[busy(dt.init(d, model, seed=i), seed=i, size=0.1 + j) for i in range(4)] for j, d in enumerate(kinds)]
    found = []
    for space, weights in zip(dt.unified_subspace(families, dim=3), families, strict=True):
        W = torch.cat([space[n.partition(".")[2]][0].flatten(0, -2) for n in weights[0].tensors])
        b = torch.cat([space[n.partition(".")[2]][1].flatten() for n in weights[0].tensors])
        point = torch.cat([t.flatten() for t in weights[2].tensors.values()])
        found.append(torch.linalg.lstsq(W, (point - b)[:, None]).solution)
        torch.testing.assert_close(W @ found[-1] + b[:, None], point[:, None], rtol=0, atol=1e-3)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-3)


def test_too_few_weights_make_no_subspace():
    model = tiny.llama()
    with pytest.raises(dt.DeltaTuneError, match="more than 2 weights"):
        dt.subspace([dt.init(dt.LoRA(rank=2), model)], dim=2)


def test_presets_are_plain_deltas():
    model = tiny.bert()
    for delta in (dt.mam(length=3, size=4), dt.unipelt(length=3, size=4, rank=2)):
        assert dt.parse(str(delta)) == delta
        assert dt.sites(model, delta).parameters > 0
