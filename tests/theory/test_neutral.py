"""The neutral-delta check: it sees what is neutral, what is not, and says why."""

from __future__ import annotations

import pytest

import deltatune as dt
from deltatune.theory.neutral import check_neutral
from tests import tiny
from tests.theory.planted import batches


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
@pytest.mark.parametrize("delta", [dt.LoRA(rank=2), dt.Adapter(size=4) + dt.BitFit(), dt.Full()])
def test_a_fresh_delta_is_found_neutral(name, delta):
    model = tiny.FAMILIES[name]()
    found = check_neutral(model, delta, batches(model))
    assert found.neutral and found.size > 0 and found.batches == 2
    assert "starts neutral" in found.finding


def test_what_does_not_start_neutral_is_found_with_its_reason():
    model = tiny.llama()
    found = check_neutral(model, dt.Masking(sparsity=0.5), batches(model))
    assert not found.neutral and found.apart > 0.01
    assert found.reasons == (dt.Masking.breaks["identity"],) and found.reasons[0] in found.finding


def test_it_leaves_the_model_as_it_was():
    model = tiny.llama().train()
    before = dict(model.state_dict())
    check_neutral(model, dt.LoRA(rank=2), batches(model))
    assert model.training and all(m.training for m in model.modules())
    assert model.state_dict().keys() == before.keys() and not dt.attachments(model)


def test_nothing_to_measure_on_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="no batches"):
        check_neutral(tiny.llama(), dt.LoRA(rank=2), [])
