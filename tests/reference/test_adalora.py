"""AdaLoRA against peft: function, parameters, and the ranks that its allocator leaves step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core.method import Bag
from deltatune.core.motion import advance
from tests.laws.cases import busy
from tests.reference.compare import copied
from tests.reference.single import PLACE, assert_same, peft_single, single, started

STEPS = 8


def put(layer, leaves):
    """Give peft's layer our tensors."""
    copied(layer.lora_A["default"], leaves["Q"])
    copied(layer.lora_B["default"], leaves["P"])
    copied(layer.lora_E["default"], leaves["lam"][:, None])


def test_adalora_equals_peft_with_the_same_tensors():
    from peft import AdaLoraConfig

    model, weights = started(dt.AdaLoRA(rank=2, alpha=8.0, extra=3))
    layer = peft_single(AdaLoraConfig(init_r=5, lora_alpha=8, total_step=10, target_modules=["layer"]))
    put(layer, {name.rpartition(".")[2]: tensor for name, tensor in weights.tensors.items()})
    assert_same(model, weights, layer)
    assert weights.count == 5 * (24 + 20 + 1)


class Two(nn.Module):
    """Two linears in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 10), nn.Linear(10, 9)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def two() -> nn.Module:
    torch.manual_seed(0)
    return Two()


@pytest.mark.parametrize(("warmup", "cooldown", "interval"), [(0, 0, 1), (1, 2, 1), (2, 1, 2)])
def test_the_ranks_that_are_left_are_those_of_peft_at_every_step(warmup, cooldown, interval):
    from peft import AdaLoraConfig, get_peft_model

    method = dt.AdaLoRA(rank=2, alpha=8.0, extra=3, warmup=warmup, cooldown=cooldown, interval=interval)
    config = AdaLoraConfig(
        init_r=5, target_r=2, lora_alpha=8, total_step=STEPS, tinit=warmup, tfinal=cooldown, deltaT=interval,
        target_modules=["one", "two"], orth_reg_weight=0.0,
    )  # fmt: skip
    theirs = get_peft_model(two(), config)
    model = two()
    weights = busy(dt.init(method.at("path:{one,two}"), model), seed=2, size=0.3)
    attachment = dt.attach(model, weights)
    layers = {name: theirs.base_model.model.get_submodule(name) for name in ("one", "two")}
    for name, layer in layers.items():
        put(layer, {leaf: weights.tensors[f"0.{name}.{leaf}"] for leaf in ("P", "lam", "Q")})
    sites = [live(attachment, name) for name in layers]
    mine = torch.optim.SGD(attachment.parameters(), 0.02)
    other = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], 0.02)
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    zeros = []
    for step in range(1, STEPS + 1):
        for net, optimizer in ((model, mine), (theirs, other)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(step)
        advance(attachment, step, STEPS)
        for p, layer in zip(sites, layers.values(), strict=True):
            torch.testing.assert_close(p.lam, layer.lora_E["default"].flatten(), rtol=1e-3, atol=1e-5)
        zeros.append(sum(int((p.lam == 0).sum()) for p in sites))
    assert zeros[-1] == 2 * (5 - 2)
    assert zeros[0] == 0 or not warmup


def live(attachment, name):
    """Return the live leaves of one site as attributes."""
    return Bag({n.rpartition(".")[2]: t for n, t in attachment.named_tensors() if n.split(".")[1] == name})


def test_the_penalty_is_that_of_the_paper():
    method = dt.AdaLoRA(rank=2, extra=1, orthogonality=0.7)
    leaves = {n: torch.randn(leaf.shape) for n, leaf in method.leaves(site()).items()}
    expected = 0.0
    for i in range(3):
        for j in range(3):
            P, Q = leaves["P"], leaves["Q"]
            expected += 0.7 * ((P[:, i] @ P[:, j] - float(i == j)) ** 2 + (Q[i] @ Q[j] - float(i == j)) ** 2)
    torch.testing.assert_close(method.penalty(Bag(leaves)), torch.as_tensor(expected), rtol=1e-5, atol=1e-4)


def site():
    return dt.sites(single(), dt.LoRA().at(PLACE)).placements[0].site


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("AdaLoRA(extra=-1)", r"extra=-1\) cannot be built; write extra=0 or more"),
        ("AdaLoRA(rank=0)", r"rank=0\) cannot be built"),
        ("AdaLoRA(interval=0)", r"interval=0\) cannot be built"),
        ("AdaLoRA(warmup=-1)", r"warmup=-1\) cannot be built"),
    ],
)
def test_what_makes_no_sense_is_refused(written, message):
    with pytest.raises(dt.DeltaTuneError, match=message):
        dt.parse(written)


def test_the_rank_at_first_must_fit_the_widths():
    with pytest.raises(dt.DeltaTuneError, match="starts at rank 21, above the dimensions of 'layer': 20 x 24"):
        dt.sites(single(), dt.AdaLoRA(rank=17, extra=4).at(PLACE))


def test_a_run_too_short_for_the_schedule_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="leaves none of 10 steps to choose ranks in; write less than 10"):
        dt.AdaLoRA(warmup=6, cooldown=4).step([], 1, 10)
