"""Parameter counts of the study (Ding et al., 2022, table 1 and section 5.1) on models of the real sizes, without storage."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt

L, D, FFN = 12, 768, 3072  # BERT-base


@cache
def hollow(name: str) -> nn.Module:
    """Return a model of the real size whose parameters have shapes and no storage."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        RobertaConfig,
        RobertaForMaskedLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    t5: dict[str, Any] = {"d_model": D, "d_ff": 2048, "num_layers": L, "num_heads": 12, "vocab_size": 32128}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    configs = {
        "t5-base": (T5ForConditionalGeneration, T5Config(**t5, feed_forward_proj="gated-gelu")),
        "bert-base": (BertForMaskedLM, BertConfig()),
        "roberta-large": (RobertaForMaskedLM, RobertaConfig(**large, vocab_size=50265, max_position_embeddings=514)),
    }
    build, config = configs[name]
    with torch.device("meta"):
        model = build(config)
    if (
        name == "t5-base"
    ):  # version 1.1 has an output table of its own, which transformers ties until a checkpoint brings it
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


def count(name: str, delta: Any) -> int:
    return dt.sites(hollow(name), delta).parameters


def test_the_hollow_t5_is_the_one_of_the_study():
    assert sum(p.numel() for p in hollow("t5-base").parameters()) == 247_577_856


@pytest.mark.parametrize(
    ("name", "delta", "expected"),
    [
        ("t5-base", dt.LoRA(rank=8), 884_736),  # r (d + d) at q and v of 12 + 12 + 12 attentions
        ("t5-base", dt.LoRA(rank=8) + dt.Full().at("norm"), 884_736 + 62 * D),  # the study also trains the norms
        ("t5-base", dt.PromptTuning(length=100), 76_800),
        ("t5-base", dt.Adapter(size=64), 60 * (2 * D * 64 + 64 + D)),  # 2 an encoder block, 3 a decoder block
        ("t5-base", dt.PrefixTuning(length=5), 5 * 36 * 2 * D),
        ("t5-base", dt.Full(), 247_577_856),
        ("roberta-large", dt.PromptTuning(length=10), 10_240),
        ("roberta-large", dt.Adapter(size=64), 6_343_680),
        ("bert-base", dt.Adapter(size=16), L * 2 * (2 * D * 16 + 16 + D)),
        ("bert-base", dt.pfeiffer(size=16), L * (2 * D * 16 + 16 + D)),
        ("bert-base", dt.adapterdrop(size=16, first=5), (L - 5) * 2 * (2 * D * 16 + 16 + D)),
        ("bert-base", dt.LoRA(rank=4), L * 2 * (2 * D * 4)),
        ("bert-base", dt.BitFit(), L * (7 * D + FFN) + D),  # and the norm of the embeddings
        ("bert-base", dt.BitFit().at("{attn.{q,k,v,o},ffn.{up,down}}[3]"), 5 * D + FFN),
        ("bert-base", dt.BitFit().at("norm[3]"), 2 * D),
    ],
    ids=str,
)
def test_counts_are_those_of_the_paper(name, delta, expected):
    assert count(name, delta) == expected


def test_a_bert_block_has_seven_biases_of_the_width_and_one_of_the_feed_forward():
    rows = [r for r in dt.sites(hollow("bert-base"), dt.BitFit()).rows() if ".layer.3." in r[0]]
    assert sorted(r[4] for r in rows) == [D] * 7 + [FFN]


def test_a_prefix_through_a_network_counts_n_m_and_m_m_and_2_d_m_a_layer_and_its_biases():
    n, m = 30, 512
    delta = dt.Reparam(dt.PrefixTuning(length=n), dt.MLP(size=m, hidden=m))
    assert count("bert-base", delta) == n * m + m * m + L * 2 * D * m + (m + L * 2 * D)


def test_shares_are_those_that_the_study_reports_in_percent():
    model = hollow("t5-base")
    assert round(dt.sites(model, dt.PromptTuning(length=100)).share, 2) == 0.03
    assert round(dt.sites(model, dt.LoRA(rank=8) + dt.Full().at("norm")).share, 2) == 0.38
    assert round(dt.sites(hollow("roberta-large"), dt.Adapter(size=64)).share, 2) == 1.75
