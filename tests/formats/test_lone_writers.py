"""What is written for torchtune, litgpt and loralib has their names and shapes, and is read back as the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune import formats
from tests import tiny
from tests.formats.small import bert, llama, scores, t5
from tests.laws.cases import busy
from tests.reference.compare import scores as long_scores

EVERYWHERE = "{attn.{q,k,v,o},ffn.{gate,up,down},head}"


def trained(model: nn.Module, delta: Any) -> dt.Weights:
    """Return weights far from where they start."""
    return busy(dt.init(delta, model), size=0.3)


@torch.no_grad()
def assert_same(model: nn.Module, one: dt.Weights, other: dt.Weights, run: Callable[..., Any] = scores) -> None:
    bare = run(model)
    with dt.attach(model, one):
        first = run(model)
    with dt.attach(model, other):
        second = run(model)
    assert (first - bare).abs().max() > 1e-2
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("method", [dt.LoRA(2, 6), dt.DoRA(2, 6)], ids=["lora", "dora"])
def test_torchtune_reads_back_what_was_written(tmp_path, method):
    model = llama()
    weights = trained(model, method.at(EVERYWHERE))
    formats.write("torchtune", model, weights, tmp_path / "out")
    assert_same(model, weights, formats.read(model, tmp_path / "out"))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 6)
    found = shapes(torch.load(tmp_path / "out/adapter_model.pt", weights_only=True))
    assert found["layers.1.attn.k_proj.lora_a.weight"] == [2, 16]
    assert found["layers.1.attn.k_proj.lora_b.weight"] == [8, 2]
    assert found["layers.0.mlp.w2.lora_a.weight"] == [2, 24]
    assert found["output.lora_b.weight"] == [32, 2]
    assert len(found) == (2 * 7 + 1) * (2 if isinstance(method, dt.LoRA) else 3)


@pytest.mark.parametrize("name", ["torchtune", "litgpt"])
@pytest.mark.parametrize("build", [tiny.llama, tiny.mistral, tiny.qwen2])
def test_every_family_reads_back_its_heads(tmp_path, name, build):
    model = build()
    weights = trained(model, dt.LoRA(2, 5).at("attn.{q,k,v,o}"))
    formats.write(name, model, weights, tmp_path)
    assert_same(model, weights, formats.read(model, tmp_path), long_scores)


def test_litgpt_reads_back_what_was_written(tmp_path):
    model = llama()
    weights = trained(model, dt.LoRA(2, 6).at("{attn.{q,v,o},ffn.{gate,up,down},head}"))
    dt.write_litgpt(model, weights, tmp_path)
    assert_same(model, weights, formats.read(model, tmp_path))
    held = torch.load(tmp_path / "lit_model.pth.lora", weights_only=True)
    assert held.keys() == {"model"}
    found = shapes(held["model"])
    assert found["transformer.h.0.attn.qkv.lora_A"] == [4, 16]
    assert found["transformer.h.0.attn.qkv.lora_B"] == [16 + 8, 2]
    assert found["transformer.h.1.mlp.fc_2.lora_B"] == [24, 2]
    assert found["lm_head.lora_A"] == [2, 16]
    lines = (tmp_path / "hyperparameters.yaml").read_text().splitlines()
    assert {"lora_r: 2", "lora_alpha: 6", "lora_query: true", "lora_key: false", "lora_mlp: true"} <= {*lines}


@pytest.mark.parametrize("build", [tiny.gpt_neox, tiny.phi])
def test_litgpt_s_layers_without_a_gate_have_a_name_of_their_own(tmp_path, build):
    model = build()
    weights = trained(model, dt.LoRA(2, 6).at("{attn.{q,k,v},ffn.{up,down}}"))
    dt.write_litgpt(model, weights, tmp_path)
    held = torch.load(tmp_path / "lit_model.pth.lora", weights_only=True)["model"]
    assert "transformer.h.0.mlp.fc.lora_A" in held
    assert_same(model, weights, formats.read(model, tmp_path), long_scores)


def test_loralib_needs_the_alpha_of_the_method_alone(tmp_path):
    model = bert()
    weights = trained(model, dt.LoRA(2, 6).at("{attn.{q,v},head}") + dt.LoRA(3, 6).at("ffn.up[1]"))
    dt.write_loralib(model, weights, tmp_path)
    assert_same(model, weights, formats.read_loralib(model, tmp_path / "lora.pt", alpha=6))
    found = shapes(torch.load(tmp_path / "lora.pt", weights_only=True))
    assert found["bert.encoder.layer.1.intermediate.dense.lora_A"] == [3, 16]
    assert found["bert.encoder.layer.1.intermediate.dense.lora_B"] == [24, 3]
    assert len(found) == 2 * (2 * 2 + 1 + 1)


@pytest.mark.parametrize(
    ("where", "enabled"), [("attn.{q,v}", ("q", "v")), ("attn.{q,k,v}", ()), ("path:transformer.h.*.attn.c_attn", ())]
)
def test_loralib_s_packed_modules_are_read_back(tmp_path, where, enabled):
    model = tiny.gpt2()
    weights = trained(model, dt.LoRA(2, 6).at(where))
    dt.write_loralib(model, weights, tmp_path)
    again = formats.read_loralib(model, tmp_path / "lora.pt", alpha=6, enabled=enabled)
    assert_same(model, weights, again, long_scores)


REFUSED: dict[str, tuple[str, Callable[[], nn.Module], Any, str]] = {
    "method": ("torchtune", llama, dt.IA3(), "files hold LoRA and DoRA, and this delta has IA3"),
    "dora": ("litgpt", llama, dt.DoRA(2, 4), "files hold LoRA, and this delta has DoRA"),
    "both": (
        "torchtune",
        llama,
        dt.LoRA(2, 4).at("attn.q") + dt.DoRA(2, 4).at("attn.v"),
        "one method for all .* DoRA, LoRA",
    ),
    "ranks": (
        "torchtune",
        llama,
        dt.LoRA(2, 4).at("attn.q") + dt.LoRA(3, 4).at("attn.v"),
        "one rank for all modules; .* 2, 3",
    ),
    "alphas": ("litgpt", llama, dt.LoRA(2, 4).at("attn.q") + dt.LoRA(2, 8).at("attn.v"), "one alpha for all modules"),
    "alpha": ("loralib", bert, dt.LoRA(2, 4).at("attn.q") + dt.LoRA(2, 8).at("attn.v"), "one alpha for all modules"),
    "twice": ("loralib", bert, dt.LoRA(2, 4).at("attn.q") + dt.LoRA(2, 4).at("attn.q"), "has one LoRA at a module"),
    "fixed": ("loralib", bert, dt.LoRA(2, 4, dt.PiSSA()).at("attn.q"), "the trained factors alone"),
    "family": ("torchtune", bert, dt.LoRA(2, 4), "written for llama, mistral, qwen2; this is bert"),
    "bias": ("torchtune", tiny.qwen2, dt.DoRA(2, 4).at("attn.q"), "DoRA rescales the bias of a layer"),
    "stacks": ("litgpt", t5, dt.LoRA(2, 4), "models of one stack; t5 has 2"),
    "embedding": (
        "torchtune",
        llama,
        dt.LoRA(2, 4).at("path:model.embed_tokens"),
        "files hold LoRAs of linear layers; .* is of the kind 'embedding'",
    ),
    "blocks": ("torchtune", llama, dt.LoRA(2, 4).at("attn.q[1]"), "nothing at 'model.layers.0.self_attn.q_proj'"),
    "ffn": ("litgpt", llama, dt.LoRA(2, 4).at("ffn.up"), "nothing at 'model.layers.0.mlp.gate_proj'"),
    "parts": ("loralib", tiny.gpt2, dt.LoRA(2, 4).at("{attn.q,attn.v[1]}"), "does not say which parts"),
    "order": ("loralib", tiny.gpt_neox, dt.LoRA(2, 4).at("attn.q"), "equal parts one after the other"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_say_is_refused_before_anything_is_written(tmp_path, case):
    name, build, delta, words = REFUSED[case]
    model = build()
    with pytest.raises(dt.DeltaTuneError, match=words):
        formats.write(name, model, trained(model, delta), tmp_path / "out")
    assert not Path(tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["torchtune", "litgpt", "loralib"])
def test_numbers_that_are_none_are_not_written(tmp_path, name):
    model = llama()
    weights = trained(model, dt.LoRA(2, 4).at("attn.q"))
    next(iter(weights.tensors.values()))[0, 0] = float("nan")
    with pytest.raises(dt.DeltaTuneError, match="NaN or infinity"):
        formats.write(name, model, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_peft_keeps_its_config(tmp_path):
    model = llama()
    weights = trained(model, dt.LoRA(2, 4).at("attn.q"))
    dt.write_peft(model, weights, tmp_path)
    before = (tmp_path / "adapter_config.json").read_bytes()
    with pytest.raises(dt.DeltaTuneError, match="holds an adapter of peft"):
        dt.write_torchtune(model, weights, tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == before
