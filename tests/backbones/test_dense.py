"""Dense attention against torch's own, and models that attend through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import deltatune as dt
from deltatune.backbones import dense
from deltatune.backbones.dense import Dense, attend_densely
from deltatune.core.products import ROUNDED, saying
from tests import tiny

SHAPES = {"whole": 1 << 20, "row by row": 1}
MODELS = {"llama": tiny.llama, "t5": tiny.t5, "bert": tiny.bert}


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("cached", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("times", [0, 4])
def test_it_is_attention_with_its_gradients(
    cached: int, rows: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "CACHED", cached)
    monkeypatch.setattr(dense, "KEPT", times)
    q, k, v, bias = tensors((5, 2, 4, 3), (5, 2, 6, 3), (5, 2, 6, 7), (rows, 2, 4, 6))
    shown = (torch.rand(5, 1, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.7).index_fill(
        3, torch.tensor(0), True
    )
    expected = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(~shown, -torch.inf), scale=0.3)
    mask = torch.zeros(shown.shape, dtype=torch.float64).masked_fill_(~shown, torch.finfo(torch.float64).min / 2)
    ours: Any = Dense.apply(q, k, v, bias, mask, 0.3)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    slope = torch.randn_like(expected)
    pairs = (torch.autograd.grad(y, (q, k, v, bias), slope) for y in (ours, expected))
    for own, other in zip(*pairs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-12)


def grads(model: Any, delta: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and all gradients of a delta on a batch with padding."""
    batch = tiny.batch(model)
    with dt.attach(model, delta) as a:
        logits = model(**batch).logits.float()
        logits.square().mean().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in a.parameters()])


@pytest.mark.parametrize("method", [dt.LoRA(rank=4), dt.PrefixTuning(length=5)], ids=["LoRA", "PrefixTuning"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_through_it_as_through_its_own(name: str, method: Any) -> None:
    exact = grads(MODELS[name](), method)
    rough = MODELS[name]().bfloat16()
    before = grads(rough, method)
    attend_densely(rough)
    assert rough.config._attn_implementation == dense.NAME
    after = grads(rough, method)
    assert rough.config._attn_implementation == dense.NAME, "a delta that adds keys gives the setting back"
    for own, sdpa, truth in zip(after, before, exact, strict=True):
        error, theirs = ((x - truth).norm() / truth.norm() for x in (own, sdpa))
        assert error < 2 * theirs + 0.01


def test_what_attends_in_another_way_is_left_alone() -> None:
    model: Any = tiny.llama()
    model.set_attn_implementation("eager")
    attend_densely(model)
    assert model.config._attn_implementation == "eager"
    plain, through = tiny.llama(), tiny.llama()
    attend_densely(through)
    batch = tiny.batch(plain)
    assert torch.equal(plain(**batch).logits, through(**batch).logits), "float32 goes the old way, bit for bit"


@pytest.mark.parametrize("method", [dt.LoRA(rank=4), dt.PrefixTuning(length=5)], ids=["LoRA", "PrefixTuning"])
@pytest.mark.parametrize("name", MODELS)
def test_where_onednn_is_asked_for_float32_short_rows_are_attended_to_densely(
    name: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, model, calls = grads(MODELS[name]().double(), method), MODELS[name](), []
    attend_densely(model)
    monkeypatch.setattr(Dense, "apply", lambda *given, dense=Dense.apply: calls.append(given) or dense(*given))
    with saying(ROUNDED):
        for found, truth in zip(grads(model, method), exact, strict=True):
            torch.testing.assert_close(found.double(), truth.double(), rtol=1e-4, atol=1e-5)
        assert calls
        monkeypatch.setattr(dense, "SHORT", 0)
        calls.clear()
        grads(model, method)
    assert not calls, "long rows go the old way"
