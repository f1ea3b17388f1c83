"""peft's contexts in front of the text that are more than a prompt: CPT, multitask prompts, cartridges, LLaMA-Adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.formats.peft import read_peft, write_peft
from tests import tiny
from tests.formats.folders import assert_equal, assert_round_trip, assert_same, edited, loaded, rewritten, saved
from tests.laws.cases import busy
from tests.reference.compare import TOLERANCE, scores

CAUSAL = {"task_type": "CAUSAL_LM"}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "cartridge": ("CartridgeConfig", {"num_virtual_tokens": 5, "num_frozen_tokens": 2}, "Cartridge(length=5, frozen=2)"),
    "unfrozen": ("CartridgeConfig", {"num_virtual_tokens": 4, "num_frozen_tokens": 0}, "Cartridge(length=4, frozen=0)"),
    "llama-adapter": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 2}, 'LLaMAAdapter(length=3).at("attn[1:]")'),
    "everywhere": ("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 3}, "LLaMAAdapter(length=3)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_context_of_peft_is_read_and_written_as_the_same_function(case, tmp_path):
    import peft

    name, fields, text = CASES[case]
    config = getattr(peft, name)(**fields, **CAUSAL)
    weights = assert_round_trip(tmp_path, tiny.llama, config, exact="llama" in case, size=0.5)
    assert str(weights.delta) == text


def context(theirs: Any) -> torch.Tensor:
    """Return peft's scores for the batch with its own context in front, without the loss that its forward computes."""
    batch, tokens = tiny.batch(tiny.llama()), theirs.prompt_encoder["default"](torch.arange(3)).expand(3, -1, -1)
    words = torch.cat([tokens, theirs.base_model.get_input_embeddings()(batch["input_ids"])], 1)
    mask = torch.cat([torch.ones(3, 3, dtype=torch.long), batch["attention_mask"]], 1)
    y = theirs.base_model(inputs_embeds=words, attention_mask=mask).logits[:, 3:]
    return y[batch["attention_mask"].bool()]


@torch.no_grad()
def test_cpt_is_read_as_the_context_that_it_has_become(tmp_path):
    from peft import CPTConfig

    fields = {"cpt_token_ids": [7, 9, 11], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1, 2, 4]}
    theirs = saved(tmp_path / "theirs", tiny.llama, CPTConfig(**fields, **CAUSAL), size=0.01)
    weights, model = read_peft(tiny.llama(), tmp_path / "theirs"), tiny.llama()
    assert str(weights.delta) == "CPT(ids=(7, 9, 11), types=(1, 2, 4))"
    with dt.attach(model, weights):
        torch.testing.assert_close(scores(model), context(theirs), **TOLERANCE)
    write_peft(tiny.llama(), weights, tmp_path / "ours")
    assert_equal(read_peft(tiny.llama(), tmp_path / "ours"), weights)
    moved = busy(weights, size=0.1)
    write_peft(tiny.llama(), moved, tmp_path / "moved")
    with dt.attach(model, moved):
        torch.testing.assert_close(scores(model), context(loaded(tmp_path / "moved", tiny.llama)), **TOLERANCE)


@torch.no_grad()
def test_multitask_prompts_are_read_for_every_task(tmp_path):
    from peft import MultitaskPromptTuningConfig

    fields = {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2}
    theirs = saved(tmp_path / "theirs", tiny.llama, MultitaskPromptTuningConfig(**fields, **CAUSAL), size=0.5)
    weights, batch = read_peft(tiny.llama(), tmp_path / "theirs"), tiny.batch(tiny.llama())
    for task in (0, 2):
        model = tiny.llama()
        with dt.attach(model, dt.of_task(weights, task)):
            ours = scores(model)
        y = theirs(**batch, task_ids=torch.full((3,), task)).logits[:, 4:]
        torch.testing.assert_close(ours, y[batch["attention_mask"].bool()], **TOLERANCE)
    write_peft(tiny.llama(), weights, tmp_path / "ours")
    assert_equal(read_peft(tiny.llama(), tmp_path / "ours"), weights)


def test_layers_that_peft_does_not_mean_are_refused(tmp_path):
    from peft import AdaptionPromptConfig

    saved(tmp_path, tiny.llama, AdaptionPromptConfig(adapter_len=3, adapter_layers=2, **CAUSAL))
    edited(tmp_path, adapter_layers=3)
    with pytest.raises(dt.DeltaTuneError, match="do not belong together"):
        read_peft(tiny.llama(), tmp_path)
    edited(tmp_path, adapter_layers=2)
    with pytest.raises(dt.DeltaTuneError, match="not for gpt2"):
        read_peft(tiny.gpt2(), tmp_path)
    rewritten(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "gate" not in n})
    with pytest.raises(dt.DeltaTuneError, match="has a prompt and a gate"):
        read_peft(tiny.llama(), tmp_path)
    first = dt.init(dt.parse('LLaMAAdapter(length=3).at("attn[:2]")'), tiny.llama())
    with pytest.raises(dt.DeltaTuneError, match="in the last attentions"):
        write_peft(tiny.llama(), first, tmp_path / "out")


@torch.no_grad()
def test_a_cartridge_trained_here_is_the_same_in_peft(tmp_path):
    weights = busy(dt.init(dt.Cartridge(length=4), tiny.llama()), size=0.5)
    write_peft(tiny.llama(), weights, tmp_path)
    assert_same(tiny.llama, weights, loaded(tmp_path, tiny.llama))
