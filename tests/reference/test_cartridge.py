"""Cartridge against peft started from the same text, and against the text itself in front of every row."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.backbones.keys_values import keys_values
from tests import tiny
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, batch_of, copied, moved, scores

TEXT = [5, 17, 8, 40, 23, 9]
P = len(TEXT)


def with_text(model, given, text=TEXT):
    """Return the scores of the rows with the text's tokens in front of each."""
    longer = torch.cat([torch.tensor(text).expand(3, -1), given["input_ids"]], 1)
    mask = torch.cat([torch.ones(3, len(text), dtype=torch.long), given["attention_mask"]], 1)
    return model(input_ids=longer, attention_mask=mask).logits[:, len(text) :][given["attention_mask"].bool()]


@torch.no_grad()
@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_a_fresh_cartridge_computes_what_the_text_in_front_does(frozen):
    model = BACKBONES["llama"]()
    delta = dt.Cartridge(length=P, frozen=frozen, init=dt.KeysValues())
    weights = dt.init(delta, model, evidence={"keys_values": keys_values(model, TEXT)})
    assert weights.count == 3 * 2 * (P - frozen) * 16  # two key/value heads of 8
    with dt.attach(model, weights):
        ours = scores(model)
    torch.testing.assert_close(ours, with_text(model, batch_of("llama")), **TOLERANCE)


@torch.no_grad()
def test_a_cartridge_equals_peft_started_from_the_same_text():
    from peft import CartridgeConfig, get_peft_model
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    model, given = BACKBONES["llama"](), batch_of("llama")
    delta = dt.Cartridge(length=P, init=dt.KeysValues())
    weights = dt.init(delta, model, evidence={"keys_values": keys_values(model, TEXT)})
    cache = model(input_ids=torch.tensor([TEXT]), use_cache=True).past_key_values
    pairs = tuple((layer.keys, layer.values) for layer in cache.layers)
    theirs = get_peft_model(BACKBONES["llama"](), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    initialize_kv_prefix_from_past_key_values(theirs, past_key_values=pairs, num_virtual_tokens=P)
    reference = theirs(**given).logits[given["attention_mask"].bool()]
    assert weights.count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    with dt.attach(model, weights):
        torch.testing.assert_close(scores(model), reference, **TOLERANCE)


@torch.no_grad()
def test_trained_keys_and_values_are_those_of_peft():
    from peft import CartridgeConfig, get_peft_model

    model, weights = moved("gpt2", dt.Cartridge(length=P, frozen=2), size=0.5)
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, num_frozen_tokens=2)
    theirs = get_peft_model(BACKBONES["gpt2"](), config)
    layers = [weights.held[f"0.transformer.h.{i}.attn.{leaf}"] for leaf in ("KV0", "KV") for i in range(2)]
    sides = [torch.cat([half[0], half[1]], -1) for half in layers]
    encoder = theirs.prompt_encoder["default"]
    copied(encoder.frozen_embedding, torch.cat(sides[:2], -1))
    copied(encoder.trainable_embedding, torch.cat(sides[2:], -1))
    given = batch_of("gpt2")
    reference = theirs.eval()(**given, position_ids=torch.arange(7)[None] - P).logits[given["attention_mask"].bool()]
    with dt.attach(model, weights):
        torch.testing.assert_close(scores(model), reference, **TOLERANCE)


@torch.no_grad()
def test_what_stays_as_it_is_travels_with_the_weights(tmp_path):
    model = BACKBONES["llama"]()
    delta = dt.Cartridge(length=P, frozen=2, init=dt.KeysValues())
    weights = dt.init(delta, model, evidence={"keys_values": keys_values(model, TEXT)})
    dt.save(dt.attach(model, weights), tmp_path)
    fresh = BACKBONES["llama"]()
    dt.load(fresh, tmp_path)
    assert torch.equal(scores(fresh), scores(model))


def test_nonsense_is_refused():
    model = BACKBONES["llama"]()
    delta = dt.Cartridge(length=P + 1, init=dt.KeysValues())
    with pytest.raises(dt.DeltaTuneError, match="starts from .'keys_values'.*evidence="):
        dt.init(delta, model)
    with pytest.raises(dt.DeltaTuneError, match=f"length {P + 1}.*has {P} of width 16.*write length={P}"):
        dt.init(delta, model, evidence={"keys_values": keys_values(model, TEXT)})
    with pytest.raises(dt.DeltaTuneError, match="trains nothing"):
        dt.Cartridge(length=2, frozen=2)
    with pytest.raises(dt.DeltaTuneError, match="causal stack"):
        keys_values(BACKBONES["bert"](), TEXT)
    with pytest.raises(dt.DeltaTuneError, match="no token ids"):
        keys_values(model, [])
    assert dt.sites(BACKBONES["t5"](), dt.Cartridge(length=P)).parameters == 4 * 2 * (P - 1) * tiny.WIDTH
