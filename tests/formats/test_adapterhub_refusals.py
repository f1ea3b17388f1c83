"""What of the library `adapters` is not read or written, and the words that say why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltatune as dt
from deltatune import formats
from deltatune.formats.adapterhub import read_adapterhub, write_adapterhub
from tests import tiny
from tests.formats.folders import assert_equal
from tests.formats.small import BUILDS, bert, scores, t5
from tests.laws.cases import busy

DATA = Path(__file__).parent / "data" / "adapterhub"


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / name, tmp_path / name))


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gate": ("bert-houlsby", {"use_gating": True}, "a gate that is averaged over all positions"),
    "norm": ("bert-houlsby", {"ln_before": True}, "a norm of its own in front"),
    "place": ("bert-houlsby", {"original_ln_before": True, "residual_before_ln": "post_add"}, "no place of an adapter"),
    "activation": ("bert-houlsby", {"non_linearity": "mish"}, "the activation 'mish'; known are relu"),
    "elsewhere": ("bert-houlsby", {"mh_adapter": False}, "of a bottleneck, of which its config says nothing"),
    "glow": ("bert-invertible", {"inv_adapter": "glow"}, "not a NICE coupling"),
    "parallel": ("t5-houlsby", {"is_parallel": True}, "in t5 it reads what goes into a norm"),
    "vera": ("bert-lora", {"vera_d": 0.1}, "whole matrices in the place of its vectors"),
    "rank": ("bert-lora", {"r": 4}, "says r=4, but .* has 2"),
    "mixture": ("bert-lora", {"architecture": "mtl_lora"}, "several up projections"),
    "prompt": ("bert-flat", {"architecture": "prompt_tuning"}, "in front of the whole row"),
    "length": ("bert-flat", {"prefix_length": 5}, "does not fit 2 attentions"),
    "curve": ("bert-reft", {"non_linearity": "relu"}, "which is linear in deltatune"),
    "dora": ("llama-dora", {"alpha": 4}, "leaves alpha / r out of the norm"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_computes_something_else_is_refused_by_name(case, tmp_path):
    name, fields, words = CONFIGS[case]
    folder = copied(name, tmp_path)
    header = json.loads((folder / "adapter_config.json").read_text())
    header["config"] |= fields
    (folder / "adapter_config.json").write_text(json.dumps(header))
    with pytest.raises(dt.DeltaTuneError, match=words):
        read_adapterhub(BUILDS[name.partition("-")[0]](), folder)


TENSORS = {
    "name": (lambda t: {k.replace(".foo.", ".bar."): v for k, v in t.items()}, "no tensor of 'foo'"),
    "half": (lambda t: {k: v for k, v in t.items() if "adapter_up" not in k}, "lacks 'adapter_up.weight'"),
    "block": (lambda t: {k.replace("layer.1", "layer.7"): v for k, v in t.items()}, "names the module .*layer.7"),
    "kind": (lambda t: {k.replace("adapters", "gadgets"): v for k, v in t.items()}, "no tensor of 'foo' that deltatune knows"),
    "nothing": (lambda t: {}, "holds no tensors of 'foo'"),
    "nan": (lambda t: {k: v * float("nan") for k, v in t.items()}, "NaN"),
    "shape": (lambda t: {k: v[:, :-1].contiguous() if "down.0.weight" in k else v for k, v in t.items()}, "has the shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused(case, tmp_path):
    change, words = TENSORS[case]
    folder = copied("bert-houlsby", tmp_path)
    save_file(change(load_file(folder / "adapter.safetensors")), folder / "adapter.safetensors")
    with pytest.raises(dt.DeltaTuneError, match=words):
        read_adapterhub(bert(), folder)


def test_pickles_and_compositions_are_refused(tmp_path):
    folder = copied("bert-houlsby", tmp_path)
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(dt.DeltaTuneError, match="is a pickle.*use_safetensors=True"):
        dt.load(bert(), folder)
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(dt.DeltaTuneError, match="there is no adapter.safetensors"):
        dt.load(bert(), folder)
    (folder / "adapter_fusion_config.json").write_text("{}")
    with pytest.raises(dt.DeltaTuneError, match="a fusion of several adapters"):
        dt.load(bert(), folder)


def test_the_name_that_an_invertible_adapter_had_first_is_known(tmp_path):
    folder = copied("bert-invertible", tmp_path)
    header = json.loads((folder / "adapter_config.json").read_text())
    header["config"] |= {"invertible_adapter": {"block_type": "nice", "reduction_factor": 2}, "inv_adapter": None}
    (folder / "adapter_config.json").write_text(json.dumps(header))
    assert_equal(read_adapterhub(bert(), folder), read_adapterhub(bert(), DATA / "bert-invertible"))


def test_a_prediction_head_is_not_left_out_in_silence(tmp_path):
    folder = copied("bert-houlsby", tmp_path)
    (folder / "head_config.json").write_text("{}")
    with pytest.raises(dt.DeltaTuneError, match="holds a prediction head .* pass check=False"):
        dt.load(bert(), folder)
    assert len(read_adapterhub(bert(), folder, check=False).tensors) == 16


def test_a_folder_for_another_model_or_family_is_refused(tmp_path):
    with pytest.raises(dt.DeltaTuneError, match="is for a bert, and this is t5; pass check=False"):
        read_adapterhub(t5(), DATA / "bert-houlsby")
    with pytest.raises(dt.DeltaTuneError, match="'bert.encoder.layer.0.attention.output', which this T5"):
        read_adapterhub(t5(), DATA / "bert-houlsby", check=False)
    with pytest.raises(dt.DeltaTuneError, match="in opt is not known here"):
        read_adapterhub(tiny.opt(), DATA / "bert-houlsby")


@torch.no_grad()
def test_a_model_without_its_head_reads_the_same_folder():
    model = bert().bert
    weights = read_adapterhub(model, DATA / "bert-houlsby")
    with_head = read_adapterhub(bert(), DATA / "bert-houlsby")
    assert len(weights.tensors) == len(with_head.tensors) == 16


@torch.no_grad()
def test_load_and_the_list_of_formats_know_the_folder(tmp_path):
    theirs, model = load_file(DATA / "bert-pfeiffer" / "scores.safetensors")["scores"], bert()
    with dt.load(model, DATA / "bert-pfeiffer"):
        torch.testing.assert_close(scores(model), theirs, rtol=0, atol=1e-5)
    weights = formats.read(bert(), DATA / "bert-pfeiffer")
    formats.write("adapterhub", bert(), weights, tmp_path / "again")
    assert_equal(formats.read(bert(), tmp_path / "again"), weights)


WRITTEN = {
    "sizes": ("bert", 'Adapter(size=3) + Adapter(size=3).at("ffn.down")', "this delta has several"),
    "place": ("bert", 'Adapter(size=3).at("attn.q")', "no place for Adapter"),
    "before": ("llama", "ParallelAdapter(size=3)", "no place for ParallelAdapter"),
    "straight": ("bert", 'Adapter(size=3, activation="identity")', "without an activation"),
    "own-norm": ("bert", "AddNormAdapter(size=3)", "norms by numbers of its own"),
    "some": ("bert", 'LoRA(rank=2).at("{attn.q,attn.v[0]}")', "breaks that rule"),
    "ranks": ("bert", 'LoRA(rank=2).at("attn.q") + LoRA(rank=3).at("attn.v")', "one rank and one alpha"),
    "input": ("bert", 'IA3().at("ffn.down:in")', "has it at whole linear layers"),
    "rotary": ("llama", "PrefixTuning(length=2)", "not those of deltatune in llama; they are in bert"),
    "width": ("bert", "Reparam(PrefixTuning(length=2), MLP(size=8))", "MLP\\(size=16\\); .* what dt.flatten"),
    "dora": ("bert", "DoRA(rank=2)", "rescales the bias"),
    "inverse": ("bert", "InvertibleAdapter()", "its inverse in heads of its own"),
    "everywhere": ("bert", "LoReFT(rank=2)", "NoReFT at the first and last positions"),
    "direct": ("bert", "AtPositions(DiReFT(rank=2), first=2)", "loads its own DiReFT as NoReFT"),
    "nothing-like": ("bert", "BitFit()", "nothing like BitFit"),
    "family": ("opt", "LoRA(rank=2)", "in opt is not known here"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_the_library_cannot_express_is_refused_before_anything_is_written(case, tmp_path):
    name, text, words = WRITTEN[case]
    model = BUILDS[name]() if name in BUILDS else tiny.FAMILIES[name]()
    weights = busy(dt.init(dt.parse(text), model))
    with pytest.raises(dt.DeltaTuneError, match=words):
        write_adapterhub(model, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MADE = {
    "one-each": ("bert", 'Adapter(size=5, activation="silu").at("{attn.o[0],ffn.down[1]}")', {"mh_adapter": [1], "output_adapter": [0]}),
    "some-blocks": ("t5", 'Adapter(size=3).at("{encoder.ffn.down[1],decoder.ffn.down[0]}")', {"output_adapter": [0, 3]}),
    "whole": ("bert", "Adapter(size=3)", {"mh_adapter": [], "output_adapter": []}),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_what_is_trained_here_is_written_with_the_blocks_that_it_leaves_out(case, tmp_path):
    name, text, expected = MADE[case]
    weights = busy(dt.init(dt.parse(text), BUILDS[name]()))
    write_adapterhub(BUILDS[name](), weights, tmp_path)
    again = read_adapterhub(BUILDS[name](), tmp_path)
    assert sorted(t.sum().item() for t in again.tensors.values()) == sorted(
        t.sum().item() for t in weights.tensors.values()
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())["config"]
    found = {flag: one["leave_out"] for one in config.get("configs", [config]) for flag in expected if one[flag]}
    assert found == expected
