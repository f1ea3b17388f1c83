"""The function-space gap against its formula, on the positions that answer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import deltatune as dt
from deltatune.theory.function_gap import compare_answers
from tests import tiny
from tests.theory.planted import batches, busy


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_it_is_the_formula_over_the_positions_that_answer(name):
    model = tiny.FAMILIES[name]()
    data, weights = batches(model, 1), busy(dt.LoRA(rank=2), model)
    found = compare_answers(model, None, weights, data)
    with torch.no_grad():
        a = model(**data[0]).logits.double()
        with dt.attach(model, weights):
            b = model(**data[0]).logits.double()
    labels = data[0]["labels"]
    if name == "llama":
        a, b, labels = a[:, :-1], b[:, :-1], labels[:, 1:]
    kept = labels != -100
    expected = F.kl_div(b[kept].log_softmax(-1), a[kept].log_softmax(-1), log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(expected), rel=1e-5)
    assert found.mse == pytest.approx(float((a[kept] - b[kept]).square().mean()), rel=1e-5)
    assert found.positions == int(kept.sum()) and 0 <= found.agreement <= 1


def test_batches_add_up_and_padding_does_not_count():
    model = tiny.llama()
    weights = busy(dt.Adapter(size=4), model)
    data = [{k: v for k, v in b.items() if k != "labels"} for b in batches(model)]
    whole = compare_answers(model, weights, None, data)
    parts = [compare_answers(model, weights, None, [b]) for b in data]
    assert whole.kl == pytest.approx(sum(p.kl * p.positions for p in parts) / whole.positions)
    assert whole.positions == sum(int(b["attention_mask"].sum()) for b in data)
    assert f"{whole.positions} positions" in whole.finding


def test_a_side_is_no_further_than_itself_and_another_model_is_a_side():
    model, weights = tiny.llama(), None
    same = compare_answers(model, weights, weights, batches(model))
    assert (same.kl, same.mse, same.agreement) == (0.0, 0.0, 1.0)
    assert compare_answers(model, None, tiny.llama(seed=1), batches(model)).kl > 0.01
    assert not dt.attachments(model)


def test_what_cannot_be_compared_is_refused():
    model = tiny.llama()
    other = tiny.llama()
    other.lm_head = torch.nn.Linear(tiny.WIDTH, 10)
    bare = [{k: v for k, v in b.items() if k != "labels"} for b in batches(model)]
    with pytest.raises(dt.DeltaTuneError, match="one vocabulary"):
        compare_answers(model, None, other, bare)
    with pytest.raises(dt.DeltaTuneError, match="no batches"):
        compare_answers(model, None, None, [])
    with pytest.raises(dt.DeltaTuneError, match="without logits"):
        compare_answers(model.model, None, None, bare)
