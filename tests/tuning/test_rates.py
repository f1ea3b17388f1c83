"""A leaf's rate: the learning rate of a recipe times it, in `tune`'s optimizer and in a plain loop with `dt.rates`."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.tuning.optim import learning_rate, make_optimizer
from deltatune.tuning.recipe import Recipe
from tests import tiny

LR = 1e-4
RATES = {
    "VeRA(rank=4)": {"d": 25.0, "b": 25.0},
    "PVeRA(rank=4)": {"d": 25.0, "b": 25.0},
    "FourierFT(entries=9)": {"c": 100.0},
    "C3A()": {"w": 300.0},
    "RoAd()": {"angle": 30.0, "scale": 30.0},
    "AdaLoRA(rank=2, extra=1)": {"P": 1.0, "lam": 30.0, "Q": 1.0},
    "LoRA(init=LoRAPlus(ratio=8.0))": {"A": 1.0, "B": 8.0},
    "VeRA(rank=4, rate=2.0)": {"d": 2.0, "b": 2.0},
    "LoRA(rank=2)": {"A": 1.0, "B": 1.0},
}


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def loss(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6)
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("text", RATES)
def test_the_first_step_of_a_plain_loop_moves_a_leaf_by_its_rate(text):
    model = tiny.llama()
    with dt.attach(model, dt.parse(text)) as a:
        before = {name: tensor.detach().clone() for name, tensor in a.named_parameters()}
        groups = [{"params": [tensor], "lr": LR * rate} for tensor, rate in dt.rates(a).items()]
        optimizer = torch.optim.AdamW(groups, eps=0.0, weight_decay=0.0)
        loss(model).backward()
        moving = {name: tensor.grad != 0 for name, tensor in a.named_parameters()}
        optimizer.step()
        moved = {name: (tensor - before[name])[moving[name]].abs() for name, tensor in a.named_parameters()}
    assert any(size.numel() for size in moved.values())
    for name, size in moved.items():  # Adam's first step is the learning rate, whatever the gradient
        torch.testing.assert_close(size, torch.full_like(size, LR * RATES[text][leaf(name)]), rtol=0.05, atol=0)


def test_a_plain_loop_over_the_rates_is_the_optimizer_of_a_recipe():
    recipe, results = Recipe(lr=LR, steps=3, schedule="constant", warmup=0.0), []
    for plain in (False, True):
        model = tiny.llama()
        with dt.attach(model, dt.VeRA(rank=4) + dt.AdaLoRA(rank=2, extra=1)) as a:
            groups = [{"params": [tensor], "lr": LR * rate} for tensor, rate in dt.rates(a).items()]
            ours = make_optimizer(recipe, a.parameters(), dt.rates(a))
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True) if plain else ours
            for step in range(recipe.steps):
                loss(model).backward()
                for group in () if plain else optimizer.param_groups:
                    group["lr"] = learning_rate(recipe)(step) * group["rate"]
                optimizer.step()
                optimizer.zero_grad()
            results.append(a.weights.tensors)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[1])
