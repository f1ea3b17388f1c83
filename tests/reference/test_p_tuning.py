"""P-tuning's prompt encoders against peft's with the same tensors, multitask prompts against peft's, and P-tuning v2's places."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, batch_of, by_path, copied, moved, scores

P, H = 4, 6


def peft_encoder(kind):
    """Return peft's prompt encoder for the tiny width."""
    from peft import PromptEncoder, PromptEncoderConfig

    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=P,
        token_dim=tiny.WIDTH,
        num_transformer_submodules=1,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=H,
    )
    return PromptEncoder(config).eval()


def fill(theirs, leaves, kind):
    """Give peft's encoder our tensors."""
    copied(theirs.embedding.weight, leaves["E_P"])
    layers = [layer for layer in theirs.mlp_head if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(layers, 1):
        copied(layer.weight, leaves[f"W{i}"])
        copied(layer.bias, leaves[f"b{i}"])
    if kind == "LSTM":
        names = {"W": "weight_ih", "U": "weight_hh", "b": "bias_ih", "c": "bias_hh"}
        for layer in (0, 1):
            for way, end in (("f", ""), ("b", "_reverse")):
                for leaf, name in names.items():
                    copied(getattr(theirs.lstm_head, f"{name}_l{layer}{end}"), leaves[f"{leaf}_{layer}{way}"])


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_prompt_encoders_equal_those_of_peft(kind):
    model, weights = moved("llama", dt.p_tuning(P, H, encoder=f"{kind}Encoder"))
    (leaves,) = by_path(model, weights).values()
    theirs = peft_encoder(kind)
    fill(theirs, leaves, kind)
    expected = theirs(torch.arange(P)[None])[0]
    plain = dt.flatten(model, weights)
    assert str(plain.delta) == f"PromptTuning(length={P})"
    (ours,) = plain.tensors.values()
    torch.testing.assert_close(ours, expected, **TOLERANCE)
    assert weights.count == sum(p.numel() for p in theirs.parameters())
    with dt.attach(model, weights) as attachment:
        through = scores(model)
        through.square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in attachment.parameters())
    with dt.attach(model, plain), torch.no_grad():
        torch.testing.assert_close(scores(model), through, **TOLERANCE)


def test_a_prompt_encoder_makes_one_leaf():
    with pytest.raises(dt.DeltaTuneError, match="one leaf of shape"):
        dt.sites(BACKBONES["llama"](), dt.Reparam(dt.PrefixTuning(length=P), dt.LSTMEncoder()))
    with pytest.raises(dt.DeltaTuneError, match="sizes of at least 1"):
        dt.MLPEncoder(hidden=0)


def peft_multitask(leaves, task, tasks):
    from peft import MultitaskPromptTuningConfig, get_peft_model

    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=tasks, num_ranks=2, num_transformer_submodules=1
    )
    theirs = get_peft_model(BACKBONES["llama"](), config).eval()
    encoder = theirs.prompt_encoder["default"]
    copied(encoder.embedding.weight, leaves["P"])
    copied(encoder.prefix_task_cols, leaves["u"])
    copied(encoder.prefix_task_rows, leaves["v"].mT)
    given = batch_of("llama")
    y = theirs(**given, task_ids=torch.full((3,), task))
    return y.logits[:, P:][given["attention_mask"].bool()], sum(p.numel() for p in encoder.parameters())


@torch.no_grad()
@pytest.mark.parametrize("task", [0, 2])
def test_multitask_prompts_equal_those_of_peft(task):
    delta = dt.MultitaskPromptTuning(length=P, tasks=3, rank=2)
    model, weights = moved("llama", delta, size=0.5)
    (leaves,) = by_path(model, weights).values()
    reference, count = peft_multitask(leaves, task, 3)
    assert weights.count == count == P * tiny.WIDTH + 3 * 2 * (P + tiny.WIDTH)
    with dt.attach(model, dt.of_task(weights, task)):
        torch.testing.assert_close(scores(model), reference, **TOLERANCE)


def test_tasks_are_numbered():
    with pytest.raises(dt.DeltaTuneError, match="has no task 2; write one of 0 to 1"):
        dt.MultitaskPromptTuning(tasks=2, task=2)
    with pytest.raises(dt.DeltaTuneError, match="no method of LoRA"):
        dt.of_task(dt.init(dt.LoRA(), BACKBONES["llama"]()), 1)


def test_p_tuning_v2_is_a_prefix_at_every_attention_and_a_head_where_it_is_asked_for():
    model = BACKBONES["bert"]()
    assert dt.sites(model, dt.p_tuning_v2(P)).parameters == 2 * (2 * P * tiny.WIDTH)
    head = sum(p.numel() for p in model.cls.parameters())
    with_head = dt.sites(model, dt.p_tuning_v2(P, head="path:cls")).parameters
    assert with_head == 2 * (2 * P * tiny.WIDTH) + head
