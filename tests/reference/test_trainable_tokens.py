"""Trainable tokens against peft's with the same rows, at a table of its own and at one tied to the head."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES, busy
from tests.reference.compare import TOLERANCE, copied, scores

TOKENS = (50, 34, 7)
TABLES = {"llama": ("embed", "embed_tokens"), "gpt2": (dt.TrainableTokens.where, "wte")}


@pytest.mark.parametrize("name", TABLES)
def test_trainable_tokens_equal_peft_with_the_same_rows(name):
    from peft import TrainableTokensConfig, get_peft_model

    place, table = TABLES[name]
    model = BACKBONES[name]()
    weights = busy(dt.init(dt.TrainableTokens(TOKENS).at(place), model), size=0.3)
    theirs = get_peft_model(
        BACKBONES[name](), TrainableTokensConfig(target_modules=[table], token_indices=list(TOKENS))
    )
    rows = next(p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n)
    copied(rows, next(iter(weights.tensors.values())))
    assert weights.count == rows.numel() == 3 * 32
    bare = scores(model)
    attachment = dt.attach(model, weights)
    ours, reference = scores(model), scores(theirs.eval())
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, **TOLERANCE)
    ours.square().mean().backward()
    reference.square().mean().backward()
    torch.testing.assert_close(next(attachment.parameters()).grad, rows.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_only_the_rows_of_the_tokens_change():
    model = tiny.llama()
    weights = busy(dt.init(dt.TrainableTokens((5, -1)), model))
    state = dt.merge(model, weights)
    assert set(state) == {"model.embed_tokens.weight", "lm_head.weight"} and weights.count == 2 * 2 * 32
    for path, tensor in state.items():
        changed = (tensor != model.get_parameter(path)).any(-1).nonzero().flatten()
        assert changed.tolist() == [5, 63]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match=r"tokens=\(\).*write their ids"):
        dt.TrainableTokens(())
    with pytest.raises(dt.DeltaTuneError, match=r"no token 64 in 'model.embed_tokens', which has 64: 0 to 63"):
        dt.sites(tiny.llama(), dt.TrainableTokens((64,)))
    with pytest.raises(dt.DeltaTuneError, match=r"names a token twice"):
        dt.sites(tiny.llama(), dt.TrainableTokens((63, -1)))
