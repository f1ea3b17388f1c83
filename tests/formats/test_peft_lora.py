"""peft's LORA, both ways: plain, rank-stabilised, with patterns, with magnitudes, at every kind of module."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.formats.peft import read_peft, write_peft
from tests import tiny
from tests.formats.folders import assert_round_trip, assert_same, edited, loaded, logits, rewritten, saved
from tests.laws.cases import busy
from tests.reference.compare import TOLERANCE

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}, "LoRA(rank=4, alpha=6.0)"),
    "all-linear": ("llama", {"target_modules": "all-linear"}, "LoRA(rank=4, alpha=6.0)"),
    "expression": ("llama", {"target_modules": r".*\.[02]\.mlp\.up_proj"}, "LoRA(rank=4, alpha=6.0)"),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}, "LoRA(rank=4, alpha=6.0)"),
    "rslora": ("llama", {"target_modules": ["o_proj"], "use_rslora": True}, "LoRA(rank=4, alpha=12.0)"),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}, "DoRA(rank=4, alpha=6.0)"),
    "gaussian": ("bert", {"target_modules": ["query"], "init_lora_weights": "gaussian"}, "LoRA(rank=4, alpha=6.0)"),
    "t5": ("t5", {"target_modules": ["q", "v"]}, "LoRA(rank=4, alpha=6.0)"),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, "LoRA(rank=4, alpha=6.0)"),
    "dora-conv1d": (
        "gpt2",
        {"target_modules": ["mlp.c_proj"], "fan_in_fan_out": True, "use_dora": True},
        "DoRA(rank=4, alpha=6.0)",
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}, "LoRA(rank=4, alpha=6.0)"),
    "tied-embedding": ("qwen2", {"target_modules": ["embed_tokens"]}, "LoRA(rank=4, alpha=6.0)"),
    "dora-embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, "DoRA(rank=4, alpha=6.0)"),
}
BUILDS = {"llama": tiny.llama, "bert": tiny.bert, "t5": tiny.t5, "gpt2": tiny.gpt2, "qwen2": tiny.qwen2}


def lora(**given: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 6, **given})


@pytest.mark.parametrize("case", CASES)
def test_peft_s_lora_is_read_and_written_as_the_same_function(case, tmp_path):
    name, config, text = CASES[case]
    weights = assert_round_trip(tmp_path, BUILDS[name], lora(**config))
    assert [str(term.method) for term in weights.delta.terms] == [text]


def test_the_wheres_are_short_paths_and_find_only_what_the_file_has(tmp_path):
    weights = assert_round_trip(tmp_path, tiny.llama, lora(target_modules=["q_proj", "v_proj"]))
    assert [term.where for term in weights.delta.terms] == ["path:model.layers.*.self_attn.{q_proj,v_proj}"]
    saved(tmp_path / "one", tiny.llama, lora(target_modules=["layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]))
    (term,) = read_peft(tiny.llama(), tmp_path / "one").delta.terms
    assert term.where == "path:{model.layers.1.self_attn.q_proj,model.layers.2.mlp.up_proj}"


def test_patterns_of_rank_and_alpha_become_terms(tmp_path):
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2, r".*v_proj": 3}, "alpha_pattern": {"v_proj": 5}}
    weights = assert_round_trip(tmp_path, tiny.llama, lora(target_modules=["q_proj", "v_proj"], **patterns))
    methods = {term.where: str(term.method) for term in weights.delta.terms}
    assert methods == {
        "path:{model.layers.0.self_attn.q_proj,model.layers.2.self_attn.q_proj}": "LoRA(rank=4, alpha=6.0)",
        "path:model.layers.*.self_attn.v_proj": "LoRA(rank=3, alpha=5.0)",
        "path:model.layers.1.self_attn.q_proj": "LoRA(rank=2, alpha=6.0)",
    }
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_differences_from_the_model_s_own(bias, tmp_path):
    weights = assert_round_trip(tmp_path, tiny.bert, lora(target_modules=["query"], bias=bias), exact=False)
    assert type(weights.delta.terms[-1].method) is dt.BitFit
    saved_before_07 = tmp_path / "theirs"
    rewritten(saved_before_07, lambda tensors: {n.replace(".base_layer.bias", ".bias"): t for n, t in tensors.items()})
    for name, tensor in read_peft(tiny.bert(), saved_before_07).tensors.items():
        assert torch.equal(tensor, weights.tensors[name])


def test_biases_that_peft_did_not_save_are_named(tmp_path):
    saved(tmp_path, tiny.bert, lora(target_modules=["query"], bias="lora_only"))
    rewritten(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("bias")})
    with pytest.raises(dt.DeltaTuneError, match=r"bias='lora_only'.*no bias: peft 0\.7 to 0\.20 did not save them"):
        read_peft(tiny.bert(), tmp_path)
    assert len(read_peft(tiny.bert(), tmp_path, check=False).delta.terms) == 1


def test_the_bias_of_b_is_a_bias_of_the_module(tmp_path):
    weights = assert_round_trip(tmp_path, tiny.llama, lora(target_modules=["q_proj"], lora_bias=True), exact=False)
    assert [type(term.method) for term in weights.delta.terms] == [dt.LoRA, dt.BitFit]


def test_whole_modules_and_tokens_travel_beside_lora(tmp_path):
    config = lora(target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"])
    weights = assert_round_trip(tmp_path / "whole", tiny.llama, config)
    assert {term.where for term in weights.delta.terms if type(term.method) is dt.Full} == {"path:{lm_head,model.norm}"}
    config = lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [50, 34, 7]})
    weights = assert_round_trip(tmp_path / "tokens", tiny.llama, config)
    assert str(weights.delta.terms[0]) == 'TrainableTokens(tokens=(50, 34, 7)).at("path:model.embed_tokens")'


def test_a_module_that_peft_unties_is_refused(tmp_path):
    saved(tmp_path, tiny.qwen2, lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(dt.DeltaTuneError, match=r"ties it to model\.embed_tokens\.weight"):
        read_peft(tiny.qwen2(), tmp_path)


def test_an_embedding_table_of_its_own_is_read_as_a_new_value(tmp_path):
    theirs = saved(tmp_path, tiny.llama, lora(target_modules=["embed_tokens"]))
    table = theirs.get_submodule("base_model.model.model.embed_tokens.base_layer").weight
    with torch.no_grad():
        torch.Tensor.add_(table, 0.1)  # type: ignore[arg-type]
    theirs.save_pretrained(str(tmp_path))
    weights = read_peft(tiny.llama(), tmp_path)
    assert [type(term.method) for term in weights.delta.terms] == [dt.Full, dt.LoRA]
    assert_same(tiny.llama, weights, theirs)


class Image(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.line = nn.Conv2d(3, 6, 3), nn.Linear(24, 5)

    def forward(self, x):
        return self.line(self.conv(x).flatten(1))


@torch.no_grad()
def test_lora_on_a_convolution_keeps_its_kernel_in_the_file(tmp_path):
    def image():
        return tiny.seeded(Image)

    theirs, x = saved(tmp_path, image, lora(r=2, target_modules=["conv", "line"])), torch.randn(2, 3, 4, 4)
    model, weights = image(), read_peft(image(), tmp_path)
    with dt.attach(model, weights):
        torch.testing.assert_close(model(x), theirs(x), **TOLERANCE)
    write_peft(image(), weights, tmp_path / "ours")
    torch.testing.assert_close(loaded(tmp_path / "ours", image)(x), theirs(x), **TOLERANCE)


WRITTEN = {
    "default": ("llama", "LoRA(rank=3)"),
    "some-layers": ("llama", 'LoRA(rank=3).at("attn.{q,o}[1:]") + LoRA(rank=2).at("ffn.up[0]")'),
    "rslora": ("t5", "LoRA(rank=3, alpha=27.712812921102035)"),
    "start": ("llama", "LoRA(rank=3, init=PiSSA())"),
    "packed": ("gpt2", 'LoRA(rank=3).at("attn.q") + LoRA(rank=2, alpha=3).at("attn.v")'),
    "twice": ("llama", 'LoRA(rank=3) + LoRA(rank=2, alpha=5).at("attn.q")'),
    "biases": ("bert", 'LoRA(rank=3) + BitFit().at("{attn.{q,k},norm}")'),
    "added-biases": ("llama", 'LoRA(rank=3).at("attn.{q,k}") + BitFit().at("attn.k")'),
    "head": ("llama", 'LoRA(rank=3) + Full().at("{head,norm}")'),
    "tokens": ("qwen2", "LoRA(rank=3) + TrainableTokens(tokens=(50, -1))"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_trained_here_is_the_same_in_peft(case, tmp_path):
    name, text = WRITTEN[case]
    build = BUILDS[name]
    weights = busy(dt.init(dt.parse(text), build()), size=0.2)
    write_peft(build(), weights, tmp_path, base="somewhere/model")
    assert_same(build, weights, loaded(tmp_path, build))
    assert_same(build, read_peft(build(), tmp_path), loaded(tmp_path, build))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "somewhere/model"


@torch.no_grad()
def test_load_knows_a_folder_of_peft(tmp_path):
    theirs, model = saved(tmp_path, tiny.llama, lora(target_modules=["q_proj"])), tiny.llama()
    with dt.load(model, tmp_path):
        torch.testing.assert_close(logits(model), logits(theirs, model), **TOLERANCE)
    edited(tmp_path, use_later=True)
    with pytest.raises(dt.DeltaTuneError, match="use_later=True.*pass check=False"):
        dt.load(model, tmp_path)
    with dt.load(model, tmp_path, check=False):
        torch.testing.assert_close(logits(model), logits(theirs, model), **TOLERANCE)
    edited(tmp_path, peft_type="NOTHING")
    with pytest.raises(dt.DeltaTuneError, match="'NOTHING', which is not read"):
        dt.load(model, tmp_path)
