"""Low-rank changes of few rows: computed in float32, they are no less exact, and all else is as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltatune as dt
from deltatune.core import products
from tests import tiny
from tests.laws.cases import busy, fresh, output
from tests.laws.test_fused import EVERY, gradients

EACH = dt.LoRA(rank=2).at(EVERY)
DELTAS = {
    "with the layer": EACH,
    "one after another": EACH + EACH,
    "shared factors": dt.VeRA(rank=4).at("ffn.{gate,up}"),
}


def model_with(delta: Any, dtype: torch.dtype) -> tuple[Any, dt.Attachment]:
    model: Any = tiny.llama()
    attachment = dt.attach(model, busy(fresh(delta, model)))
    return model.to(dtype), attachment


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    return float(sum((a.double() - b).square().sum() for a, b in zip(found, exact, strict=True)).sqrt())


@pytest.mark.parametrize("name", DELTAS)
def test_few_rows_in_bfloat16_are_as_exact_as_many(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = gradients(*model_with(DELTAS[name], torch.float64))
    model, attachment = model_with(DELTAS[name], torch.bfloat16)
    light = gradients(model, attachment)
    monkeypatch.setattr(products, "LIGHT", 0)
    heavy = gradients(model, attachment)
    assert distance(light, exact) < 1.5 * distance(heavy, exact)
    assert distance(light, heavy) > 0, "they were computed in another way"


def test_second_derivatives_of_few_rows_are_those_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model, attachment = model_with(dt.LoRA(rank=2).at(EVERY), torch.float32)
    model.config._attn_implementation = "eager"

    def curvature() -> tuple[Tensor, ...]:
        leaves = list(attachment.parameters())
        first = torch.autograd.grad(output(model).square().mean(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    light = curvature()
    monkeypatch.setattr(products, "LIGHT", 0)
    torch.testing.assert_close(light, curvature(), rtol=1e-3, atol=1e-5)
