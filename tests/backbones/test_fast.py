"""What a loop of one's own gets of `tune`'s speed computes the same, and leaves parameters and names where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.errors import DeltaTuneError
from tests import tiny
from tests.laws.cases import busy

CPU = torch.device("cpu")


def gradients(model: Any, delta: Any) -> list[Tensor]:
    attachment = dt.attach(model, busy(dt.init(delta, model)))
    batch = tiny.batch(model)
    loss = model(**batch).logits.square().mean()
    return [loss, *torch.autograd.grad(loss, list(attachment.parameters()))]


@pytest.mark.parametrize("name", ["llama", "gemma", "t5", "bert", "gpt2"])
def test_a_lean_model_with_fast_products_computes_the_same(name: str) -> None:
    plain, model = (tiny.FAMILIES[name]() for _ in range(2))
    held = dict(model.named_parameters())
    dt.lean(model)
    assert all(parameter is held[path] for path, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(plain.state_dict())
    delta = dt.LoRA(rank=2).at("{attn.{q,v},ffn.down}") + dt.LNTuning()
    with dt.products(CPU):
        found = gradients(model, delta)
    torch.testing.assert_close(found, gradients(plain, delta), rtol=1e-4, atol=1e-5)


def test_a_model_of_ones_own_can_be_lean() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    x = torch.randn(3, 4)
    before = model(x)
    dt.lean(model)
    torch.testing.assert_close(model(x), before)


def test_a_delta_comes_after() -> None:
    model = tiny.llama()
    dt.attach(model, dt.LoRA(), name="mine")
    with pytest.raises(DeltaTuneError, match="mine is attached.*make it lean first"):
        dt.lean(model)
