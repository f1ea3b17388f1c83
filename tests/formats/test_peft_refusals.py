"""What is not read or written, and the words that say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import deltatune as dt
from deltatune.formats.peft import read_peft, write_peft
from tests import tiny
from tests.formats.folders import edited, rewritten, saved

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("peft")
    saved(folder, tiny.llama, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((original / name).read_bytes())
    return tmp_path


def refused(folder: Any, words: str) -> None:
    with pytest.raises(dt.DeltaTuneError, match=words):
        read_peft(tiny.llama(), folder)


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"peft_type": "LORRA"}, r"'LORRA', which is not read\. Did you mean 'LORA'"),
    "lily": ({"peft_type": "LILY"}, "LILY, which is not read: peft's is f"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, "whose weights that start has changed"),
    "old": ({"enable_lora": [True, False, True]}, r"peft 0\.2 and older"),
    "copies": ({"layer_replication": [[0, 2]]}, "copies of blocks"),
    "future": ({"use_later": True}, "use_later=True, a field of LORA that deltatune does not know"),
    "rank": ({"r": 8}, "have r=4, but .* says 8"),
    "number": ({"lora_alpha": "16"}, "lora_alpha in .* is a number; found '16'"),
    "pattern": ({"alpha_pattern": {"q_proj(": 3}}, "is no pattern"),
    "dora": ({"use_dora": True}, "has no lora_magnitude_vector"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_config_that_is_not_understood_is_refused(case, folder):
    fields, words = FIELDS[case]
    edited(folder, **fields)
    refused(folder, words)


def test_check_off_reads_a_file_without_the_fields_that_are_not_known(folder):
    edited(folder, use_later=True)
    assert len(read_peft(tiny.llama(), folder, check=False).tensors) == 12


KEYS = {
    "module": (
        lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()},
        "'model.layers.7.self_attn.q_proj'",
    ),
    "prefix": (lambda t: {k.removeprefix("base_model."): v for k, v in t.items()}, "begin with 'base_model.model.'"),
    "name": (lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()}, "no tensor of a LORA"),
    "some-name": (
        lambda t: {**t, A.replace(".weight", ".default.weight"): t[A].clone()},
        "The adapter's name is left in it",
    ),
    "half": (lambda t: {k: v for k, v in t.items() if k != A}, "LORA needs its A and its B"),
    "shape": (lambda t: {**t, A: torch.ones(4, 33)}, r"has the shape \(4, 33\); this backbone needs \(4, 32\)"),
    "shard": (lambda t: {**t, A: torch.ones(0)}, "saved in shards"),
    "conv": (lambda t: {k: v[..., None] if "lora_B" in k else v for k, v in t.items()}, r"peft 0\.2 and older"),
    "nan": (lambda t: {**t, A: t[A] * float("nan")}, "NaN"),
    "head": (lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(65, 32)}, r"\(65, 32\).*resize the model's"),
    "empty": (lambda t: {}, "no tensor of a LORA"),
}


@pytest.mark.parametrize("case", KEYS)
def test_tensors_that_do_not_fit_are_refused(case, folder):
    change, words = KEYS[case]
    rewritten(folder, change)
    refused(folder, words)


def test_another_model_is_refused_by_name(folder):
    with pytest.raises(dt.DeltaTuneError, match="which this BertForMaskedLM does not have"):
        read_peft(tiny.bert(), folder)


def test_folders_that_are_not_peft_s_are_refused(folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"model_class": "BertModel", "version": "adapters.1.3.0", "config": {}}'
    )
    refused(tmp_path, "written by the library `adapters`")
    (tmp_path / "adapter_config.json").write_text('{"delta_type": "lora"}')
    refused(tmp_path, "has no 'peft_type'")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(tmp_path, "is not JSON")
    (tmp_path / "adapter_config.json").unlink()
    refused(tmp_path, "not a folder of peft")


def test_an_adapter_in_a_folder_of_its_own_is_pointed_at(folder):
    (folder / "english").mkdir()
    (folder / "adapter_config.json").rename(folder / "english" / "adapter_config.json")
    refused(folder, r"give .*english")


def test_pickles_and_broken_files_are_refused(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    refused(folder, "not a whole safetensors file")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, r"is a pickle.*save_pretrained")
    (folder / "adapter_model.bin").unlink()
    refused(folder, "there is no adapter_model.safetensors")


def test_oft_of_old_versions_and_of_a_cut_series_is_named(tmp_path):
    import peft

    saved(tmp_path, tiny.llama, peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"]))
    refused(tmp_path, "series that is cut off")
    assert read_peft(tiny.llama(), tmp_path, check=False).delta.terms[0].method == dt.OFT(block=8)
    rewritten(tmp_path, lambda tensors: {n.replace("oft_R.weight", "oft_r"): t for n, t in tensors.items()})
    edited(tmp_path, use_cayley_neumann=False)
    refused(tmp_path, r"the OFT of peft 0\.15 and older")


def test_experts_are_named_by_their_keys_as_well(tmp_path):
    layer = "base_model.model.model.layers.0.mlp.experts"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(8, 32), f"{layer}.lora_B.weight": torch.ones(32, 8)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    with pytest.raises(
        dt.DeltaTuneError,
        match="1 pairs of factors for 'model.layers.0.mlp.experts', whose parameters are gate_up_proj, down_proj",
    ):
        read_peft(tiny.mixtral(), tmp_path)


WRITTEN = {
    "no-type": ("llama", "Adapter()", "peft has no type for Adapter"),
    "mixed": ("llama", 'LoRA(rank=2) + LoHa(rank=2).at("attn.k")', r"no type for LoRA \+ LoHa"),
    "dora": ("llama", 'LoRA(rank=2).at("attn.q") + DoRA(rank=2).at("attn.v")', "write two folders"),
    "twice": (
        "llama",
        'HRA(rank=2).at("attn.q") + HRA(rank=4).at("attn.q")',
        "several at 'model.layers.0.self_attn.q_proj'",
    ),
    "packed-dora": ("gpt2", "DoRA(rank=2)", "this delta has a part of 'transformer.h.0.attn.c_attn'"),
    "settings": ("llama", 'HRA(rank=2).at("attn.q") + HRA(rank=4).at("attn.v")', "HRA has one setting for all modules"),
    "part": ("gpt2", 'IA3().at("attn.{k,v}")', "acts on a part of 'transformer.h.0.attn.c_attn'"),
    "conv1d": ("gpt2", 'HRA(rank=2).at("ffn.up")', r"HRA does not act on the linear, stored \[in, out\]"),
    "bias": ("llama", 'LoRA(rank=2).at("attn.q") + BitFit().at("ffn.up")', "peft adds one only where a LoRA is"),
    "alone": ("bert", "BitFit()", "BEFT does not act on the norm"),
    "beside": ("bert", 'HRA(rank=2) + BitFit().at("attn.q")', "not written beside HRA"),
    "tied": ("qwen2", 'LoRA(rank=2) + Full().at("head")', "peft would untie them"),
    "wrapped": ("llama", "Reparam(LoRA(rank=2), Subspace(dim=20))", "write what dt.flatten"),
    "two": ("llama", "PromptTuning(length=3) + LoRA(rank=2)", "stand alone"),
    "some": ("llama", 'PrefixTuning(length=3).at("attn[1:]")', "in 2 of 3"),
    "nothing": ("llama", "Delta()", "acts nowhere"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_peft_cannot_express_is_refused_before_anything_is_written(case, tmp_path):
    name, text, words = WRITTEN[case]
    model = tiny.FAMILIES[name]()
    with pytest.raises(dt.DeltaTuneError, match=words):
        write_peft(model, dt.init(dt.parse(text), model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_not_written(tmp_path):
    weights = dt.init(dt.LoRA(rank=2), tiny.llama(seed=1))
    with pytest.raises(dt.DeltaTuneError, match="another|other values"):
        write_peft(tiny.llama(), weights, tmp_path / "out")
