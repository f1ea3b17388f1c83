"""The other types of peft, both ways: the same function read, the same file written."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.formats.peft import read_peft, write_peft
from tests import tiny
from tests.formats.folders import (
    assert_equal,
    assert_round_trip,
    assert_same,
    edited,
    loaded,
    logits,
    rewritten,
    saved,
)
from tests.laws.cases import busy

BUILDS = {"llama": tiny.llama, "bert": tiny.bert, "t5": tiny.t5, "gpt2": tiny.gpt2}
QV = {"target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "IA3": ("llama", "IA3Config", {}, "IA3()"),
    "IA3-bert": (
        "bert",
        "IA3Config",
        {"target_modules": ["key", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"]},
        "IA3()",
    ),
    "IA3-gpt2": ("gpt2", "IA3Config", {"target_modules": ["c_fc"], "feedforward_modules": ["c_fc"]}, "IA3()"),
    "LN": ("bert", "LNTuningConfig", {"target_modules": ["LayerNorm"]}, "LNTuning()"),
    "RMS": ("llama", "LNTuningConfig", {"target_modules": ["input_layernorm"]}, "LNTuning()"),
    "LoHa": ("llama", "LoHaConfig", {"r": 3, "alpha": 5, **QV}, "LoHa(rank=3, alpha=5.0)"),
    "LoKr": ("llama", "LoKrConfig", {"r": 2, "alpha": 5, **QV}, "LoKr(rank=2, alpha=5.0)"),
    "LoKr-whole": ("llama", "LoKrConfig", {"r": 8, "decompose_factor": 4, **QV}, "LoKr(factor=4)"),
    "HiRA": ("llama", "HiraConfig", {"r": 3, **QV}, "HiRA(rank=3)"),
    "OFT": ("llama", "OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False, **QV}, "OFT(block=8)"),
    "OFT-shared": (
        "llama",
        "OFTConfig",
        {"oft_block_size": 8, "use_cayley_neumann": False, "block_share": True, **QV},
        "OFT(block=8, share=True)",
    ),
    "BOFT": ("llama", "BOFTConfig", {"boft_block_size": 4, **QV}, "BOFT(factors=1)"),
    "HRA": ("llama", "HRAConfig", {"r": 4, **QV}, "HRA(rank=4)"),
    "MiSS": ("llama", "MissConfig", {"r": 6, **QV}, "MiSS(rank=6)"),
    "MiSS-mini": (
        "llama",
        "MissConfig",
        {"r": 4, "mini_r": 8, "init_weights": "mini", **QV},
        "MiSS(rank=4, columns=8)",
    ),
    "Bat": ("llama", "MissConfig", {"r": 8, "init_weights": "bat", **QV}, "Bat(block=8)"),
    "C3A": ("llama", "C3AConfig", {"block_size": 8, **QV}, "C3A(block=8)"),
    "SHiRA": ("llama", "ShiraConfig", {"r": 2, **QV}, "SHiRA(rank=2, entries=LargestWeights())"),
    "AdaLoRA": (
        "llama",
        "AdaLoraConfig",
        {"init_r": 5, "target_r": 2, "lora_alpha": 8, "total_step": 9, "tinit": 1, "tfinal": 2, **QV},
        "AdaLoRA(rank=2, alpha=8.0, extra=3, warmup=1, cooldown=2, orthogonality=0.5)",
    ),
    "tokens": ("llama", "TrainableTokensConfig", {"token_indices": [50, 34, 7]}, "TrainableTokens(tokens=(50, 34, 7))"),
    "tied-tokens": ("gpt2", "TrainableTokensConfig", {"token_indices": [50, 34]}, "TrainableTokens(tokens=(50, 34))"),
}


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch):
    """Keep peft from building its CUDA extension for BOFT."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


def config_of(name: str, fields: dict[str, Any]) -> Any:
    import peft

    return getattr(peft, name)(**fields)


@pytest.mark.parametrize("case", CASES)
def test_a_type_of_peft_is_read_and_written_as_the_same_function(case, tmp_path):
    build, name, fields, text = CASES[case]
    exact = case not in ("BOFT",)  # whose skew matrices peft keeps with their own transposes
    weights = assert_round_trip(tmp_path, BUILDS[build], config_of(name, fields), exact, size=0.3)
    assert {str(term.method) for term in weights.delta.terms} == {text}


def test_patterns_of_loha_become_terms(tmp_path):
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 9}}
    weights = assert_round_trip(tmp_path, tiny.llama, config_of("LoHaConfig", {"r": 3, **QV, **patterns}), size=0.4)
    texts = {"LoHa(rank=3)", "LoHa(rank=2)", "LoHa(rank=3, alpha=9.0)"}
    assert {str(term.method) for term in weights.delta.terms} == texts


@torch.no_grad()
def test_ranks_that_adalora_cut_keep_their_scale(tmp_path):
    _, name, fields, _ = CASES["AdaLoRA"]
    theirs = saved(tmp_path / "a", tiny.llama, config_of(name, fields))
    layers = {n: m for n, m in theirs.named_modules() if n.endswith(("q_proj", "v_proj"))}
    pattern = {}
    for i, (path, layer) in enumerate(layers.items()):
        kept = [j >= i % 3 for j in range(5)] if i else [False] * 5
        layer.lora_E["default"][[not k for k in kept]] = 0
        pattern[f"{path.removeprefix('base_model.model.')}.lora_E.default"] = kept
    theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(str(tmp_path / "b"))
    weights = read_peft(tiny.llama(), tmp_path / "b")
    assert {term.method.width for term in weights.delta.terms} == {3, 4, 5}
    assert_same(tiny.llama, weights, theirs)
    with pytest.raises(dt.DeltaTuneError, match="ADALORA has one setting for all modules"):
        write_peft(tiny.llama(), weights, tmp_path / "c")


def test_lokr_of_old_versions_has_no_scale(tmp_path):
    theirs = saved(tmp_path, tiny.llama, config_of("LoKrConfig", {"r": 2, "alpha": 2, **QV}), size=0.4)
    edited(tmp_path, alpha=5)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({n: v for n, v in json.loads(path.read_text()).items() if n != "rank_dropout_scale"}))
    assert_same(tiny.llama, read_peft(tiny.llama(), tmp_path), theirs)


def test_bone_is_read_as_miss(tmp_path):
    theirs = saved(tmp_path, tiny.llama, config_of("MissConfig", {"r": 6, **QV}))
    weights = read_peft(tiny.llama(), tmp_path)
    rewritten(tmp_path, lambda tensors: {n.replace("miss_block", "bone_block"): t for n, t in tensors.items()})
    edited(tmp_path, peft_type="BONE")
    assert_equal(read_peft(tiny.llama(), tmp_path), weights)
    assert_same(tiny.llama, weights, theirs)


WRITTEN = {
    "IA3": "IA3()",
    "LN": "LNTuning()",
    "LoKr": 'LoKr(rank=2).at("attn.q[1:]") + LoKr(rank=8).at("ffn.up")',
    "SHiRA": "SHiRA(rank=2)",
    "C3A": 'C3A(block=8).at("attn.{q,v}")',
    "AdaLoRA": "AdaLoRA(rank=2)",
    "tokens": "TrainableTokens(tokens=(50, -1))",
    "head": 'HRA(rank=2) + Full().at("head")',
}


@torch.no_grad()
@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_trained_here_is_the_same_in_peft(case, tmp_path):
    weights = busy(dt.init(dt.parse(WRITTEN[case]), tiny.llama()), size=0.2)
    write_peft(tiny.llama(), weights, tmp_path)
    theirs = loaded(tmp_path, tiny.llama)
    assert_same(tiny.llama, weights, theirs)
    assert_same(tiny.llama, read_peft(tiny.llama(), tmp_path), theirs)


@torch.no_grad()
def test_modules_whose_names_end_alike_are_told_apart(tmp_path):
    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.in_q = nn.Linear(8, 8), nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"q": nn.Linear(8, 8)})

        def forward(self, x):
            return self.inner["q"](self.in_q(self.q(x)))

    def build() -> nn.Module:
        return tiny.seeded(Alike)

    for where, found in (("path:q", "q"), ("path:inner.q", ["inner.q"]), ("path:{q,inner.q}", ["q"])):
        weights, x = busy(dt.init(dt.LoRA(rank=2).at(where), build()), size=0.3), torch.randn(3, 8)
        write_peft(build(), weights, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == found
        model = build()
        with dt.attach(model, weights):
            torch.testing.assert_close(loaded(tmp_path, build)(x), model(x), rtol=0, atol=1e-5)
        assert_equal(read_peft(build(), tmp_path), weights)


PROMPTS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "prompt": ("llama", "PromptTuningConfig", {"task_type": "CAUSAL_LM"}, "PromptTuning(length=4)"),
    "prompt-t5": ("t5", "PromptTuningConfig", {"task_type": "SEQ_2_SEQ_LM"}, "PromptTuning(length=4)"),
    "p-tuning": ("llama", "PromptEncoderConfig", {"task_type": "CAUSAL_LM"}, "PromptTuning(length=4)"),
    "prefix": ("llama", "PrefixTuningConfig", {"task_type": "CAUSAL_LM"}, "PrefixTuning(length=4)"),
    "prefix-qwen2": ("qwen2", "PrefixTuningConfig", {"task_type": "CAUSAL_LM"}, "PrefixTuning(length=4)"),
    "prefix-qwen3": ("qwen3", "PrefixTuningConfig", {"task_type": "CAUSAL_LM"}, "PrefixTuning(length=4)"),
    "prefix-phi": ("phi", "PrefixTuningConfig", {"task_type": "CAUSAL_LM"}, "PrefixTuning(length=4)"),
    "prefix-neox": ("gpt_neox", "PrefixTuningConfig", {"task_type": "CAUSAL_LM"}, "PrefixTuning(length=4)"),
    "projected": (
        "llama",
        "PrefixTuningConfig",
        {"task_type": "CAUSAL_LM", "prefix_projection": True, "encoder_hidden_size": 10},
        "PrefixTuning(length=4)",
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_and_prefixes_are_read_and_written_where_positions_agree(case, tmp_path):
    name, kind, fields, text = PROMPTS[case]
    build = tiny.FAMILIES[name]
    config = config_of(kind, {"num_virtual_tokens": 4, **fields})
    weights = assert_round_trip(tmp_path, build, config, exact=not text.startswith("Prefix"), size=0.5)
    assert [str(term.method) for term in weights.delta.terms] == [text]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("gpt2", "PromptTuningConfig", "moves the positions of the text in gpt2"),
        ("gpt2", "PrefixTuningConfig", "on its learned positions they are different"),
        ("gemma2", "PrefixTuningConfig", "how gemma2 turns its keys"),
    ],
)
def test_where_positions_differ_prompts_are_refused(name, kind, words, tmp_path):
    build = tiny.FAMILIES[name]
    saved(tmp_path / "theirs", build, config_of(kind, {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}))
    with pytest.raises(dt.DeltaTuneError, match=words):
        read_peft(build(), tmp_path / "theirs")
    method = dt.PromptTuning(length=3) if kind == "PromptTuningConfig" else dt.PrefixTuning(length=3)
    with pytest.raises(dt.DeltaTuneError, match=words):
        write_peft(build(), dt.init(method, build()), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert logits(build()).isfinite().all()
