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


def test_an_adapter_without_its_biases_is_the_2_38_percent_of_the_study():
    """The study writes the bottleneck without biases: two modules an encoder block, three a decoder block, of size 64."""
    table = dt.sites(hollow("t5-base"), dt.Adapter(size=64))
    matrices = [leaf for leaf in table.tensors.values() if len(leaf.shape) == 2]
    assert len(matrices) == 2 * 60
    count = sum(rows * columns for rows, columns in (leaf.shape for leaf in matrices))
    assert count == 60 * 2 * D * 64 == 5_898_240
    assert round(100 * count / 247_577_856, 2) == 2.38
    assert table.parameters - count == 60 * (64 + D)


BIASES = dt.BitFit() + dt.BitFit().at("{head,path:lm_head.{dense,layer_norm}}")


def test_the_biases_adapters_and_prompts_of_the_study_on_roberta_large():
    """Its biases are those of the blocks, of the embeddings' norm, and of the masked-language head with its 50,265 words."""
    d, ffn, words = 1024, 4096, 50_265
    parts = [(BIASES, 323_673), (dt.Adapter(size=64), 6_343_680), (dt.PromptTuning(length=10), 10_240)]
    assert [count("roberta-large", delta) for delta, _ in parts] == [expected for _, expected in parts]
    assert count("roberta-large", dt.BitFit()) == 24 * (7 * d + ffn) + d == 271_360
    assert 271_360 + (d + d + words) == 323_673
    own = [p for n, p in hollow("roberta-large").named_parameters() if n.endswith("bias")]
    assert sum(p.numel() for p in own) == 323_673


@pytest.mark.parametrize(
    ("delta", "percent"),
    [
        (dt.Adapter(size=64), 1.75),
        (BIASES, 0.09),
        (BIASES + dt.Adapter(size=64), 1.84),
        (dt.PromptTuning(length=10), 0.003),
        (dt.PromptTuning(length=10) + dt.Adapter(size=64), 1.76),
        (dt.PromptTuning(length=10) + BIASES, 0.09),
        (dt.PromptTuning(length=10) + BIASES + dt.Adapter(size=64), 1.85),
    ],
    ids=["adapter", "biases", "both", "prompt", "prompt, adapter", "prompt, biases", "all"],
)
def test_combinations_have_the_shares_of_table_2(delta, percent):
    parts = count("roberta-large", delta)
    adapters = 6_343_680 if "Adapter" in str(delta) else 0
    whole = sum(p.numel() for p in hollow("roberta-large").parameters()) + adapters
    assert round(100 * parts / whole, 3 if percent < 0.01 else 2) == percent


QV = 2 * L  # queries and values of BERT-base
BLOCK = 4 * D * D + 2 * D * FFN + 9 * D + FFN  # its matrices, biases and norms
FORMULAS = [
    (dt.AdapterBias(), L * (FFN + D + 1)),
    (dt.Cartridge(length=128), L * 2 * (128 - 1) * D),
    (dt.Compacter(size=24, n=4), 4**3 + QV * (2 * (D + 24) + 24 + D)),
    (dt.PHMAdapter(size=24, n=4), 4**3 + QV * (2 * D * 24 // 4 + 24 + D)),
    (dt.LowRankAdapter(size=24), QV * (2 * (D + 24) + 24 + D)),
    (dt.LoReFT(rank=4), L * (2 * 4 * D + 4)),
    (dt.DiReFT(rank=4), L * (2 * 4 * D + 4)),
    (dt.NoReFT(rank=4), L * (2 * 4 * D + 4)),
    (dt.HyperFormer(size=24), QV * 64 + 64 + 128 * (2 * 64 + 1) + 64 * (128 + 1) + 2 * D * 24 * 64),
    (dt.IA3(), L * (2 * D + FFN)),
    (dt.InvertibleAdapter(), 2 * (384 * 192 + 192 + 192 * 384 + 384)),
    (dt.LLaMAAdapter(length=10), L * (10 * D + 1)),
    (dt.LadderSideTuning(reduction=8), L * (96 * D + 8 * 96**2 + 6 * 96 + 1) + 96 * D),
    (dt.MultitaskPromptTuning(length=100, tasks=3), 100 * D + 3 * (100 + D)),
    (dt.PEANuT(rank=32, depth=1), QV * (2 * 32 * D + 2 * 32 * 32)),
    (dt.ParallelAdapter(size=512), L * (512 * (D + D + 1) + D)),
    (dt.Poly(rank=8, skills=4, tasks=2), QV * (4 * 8 * (D + D) + 2 * 4)),
    (dt.SSF(), L * 2 * (5 * D + FFN)),
    (dt.TrainableTokens(tokens=(-1, -2)), 2 * D + 2),
    (dt.ChildTuning(), L * BLOCK),
    (dt.DiffPruning(), 2 * L * BLOCK),
    (dt.StructuredDiffPruning(), 2 * L * BLOCK + 16 * L),
    (dt.LNTuning(), 2 * D * (2 * L + 1)),
    (dt.LastLayers(layers=3), 3 * BLOCK),
    (dt.Masking(), L * (4 * D * D + 2 * D * FFN)),
    (dt.SHiRA(rank=32), QV * 32 * (D + D)),
    (dt.SuperTuning(share=0.01), QV * 5898),
    (dt.AdaLoRA(rank=8, extra=4), QV * 12 * (D + D + 1)),
    (dt.AdaMSS(size=100, groups=5), QV * (5 * 100 + D)),
    (dt.BOFT(block=4, factors=2), QV * (2 * (D // 4) * 6 + D)),
    (dt.Bat(block=64), QV * D * 64),
    (dt.C3A(block=256), QV * (D // 256) ** 2 * 256),
    (dt.DEFT(rank=8), QV * 8 * (D + D)),
    (dt.DID(dim=1000), 1000),
    (dt.SAID(dim=1000), 1000 + 16 * L + 5 + 5),  # 5 tensors in the embeddings, 5 in the head, which is tied
    (dt.DeLoRA(rank=8), QV * (8 * (D + D) + 1)),
    (dt.DoRA(rank=8), QV * (8 * (D + D) + D)),
    (dt.FRoD(share=0.01), QV * (D + 5898)),
    (dt.FourierFT(entries=1000), QV * 1000),
    (dt.GLoRA(rank=8), QV * (2 * 8 * (D + D) + 2 * D)),
    (dt.GraLoRA(rank=32, grid=2), QV * 32 * (D + D)),
    (dt.HRA(rank=8), QV * 8 * D),
    (dt.HiRA(rank=32), QV * 32 * (D + D)),
    (dt.KronA(factor=16), QV * (16 * 16 + 48 * 48)),
    (dt.Lily(rank=32, experts=2), L * 32 * (D + 2) + 2 * 32 * D),
    (dt.LoHa(rank=8), QV * 2 * 8 * (D + D)),
    (dt.LoKr(rank=8, factor=16), QV * (16 * 16 + 8 * (48 + 48))),
    (dt.LoRAFA(rank=8), QV * 8 * D),
    (dt.LoRAXS(rank=16), QV * 16 * 16),
    (dt.MiSS(rank=64), QV * 64 * D),
    (dt.OFT(block=32), QV * (D // 32) * (32 * 31 // 2)),
    (dt.OFT(block=32, share=True), QV * (32 * 31 // 2)),
    (dt.OSF(keep=0.5), L * (4 * 384 * (2 * D + 1) + 2 * 384 * (D + FFN + 1))),
    (dt.PSOFT(rank=32), QV * (32 * 31 // 2 + 2 * 32)),
    (dt.PVeRA(rank=256), QV * (2 * 256 + D)),
    (dt.RandLoRA(rank=32), QV * 24 * (32 + D)),
    (dt.RoAd(variant=2), QV * 2 * D),
    (dt.TinyLoRA(size=64), 6 * L * 64),
    (dt.UniLoRA(size=256), 256),
    (dt.VBLoRA(rank=4, vectors=90, size=256), QV * 4 * (3 + 3) * 90 + 90 * 256),
    (dt.VeRA(rank=256), QV * (256 + D)),
    (dt.WaveFT(entries=2592), QV * 2592),
    (dt.Gate(dt.LoRA(rank=8)), QV * (8 * (D + D) + D + 1)),
    (dt.Choose(dt.LoRA(rank=8)), QV * (8 * (D + D) + 1)),
    (dt.Mixture((dt.LoRA(rank=8), dt.LoRA(rank=4))), QV * (12 * (D + D) + 2 * D)),
    (dt.Fuse((dt.LoRA(rank=8), dt.LoRA(rank=4)), size=64), QV * (12 * (D + D) + 64 * (D + D) + D * D)),
]


@pytest.mark.parametrize(("delta", "expected"), FORMULAS, ids=[str(delta) for delta, _ in FORMULAS])
def test_the_formula_of_a_docstring_is_the_count_on_bert_base(delta, expected):
    assert count("bert-base", delta) == expected
