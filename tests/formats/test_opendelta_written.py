"""Folders of OpenDelta, written: they hold its keys, shapes and settings, and read as the same function."""

from __future__ import annotations

import json

import pytest
import torch

import deltatune as dt
from deltatune import formats
from tests.formats.small import BUILDS, scores, t5
from tests.laws.cases import busy

T5, BERT = "encoder.block.0.layer.0.SelfAttention.", "bert.encoder.layer.0.attention."
FF = "encoder.block.0.layer.1.DenseReluDense."
DOWN, UP = {"down_proj.weight": (3, 16), "down_proj.bias": (3,)}, {"up_proj.weight": (16, 3), "up_proj.bias": (16,)}
BOTTLENECK = {f"modulelist.{name}": shape for name, shape in {**DOWN, **UP}.items()}
LOW = {"W_left": (16, 1), "W_right": (1, 4), "b": (4,)}, {"W_left": (4, 1), "W_right": (1, 16), "b": (16,)}
PHM = (
    {"phm_rule": (2, 2, 2), "W_left": (2, 8, 1), "W_right": (2, 1, 2), "b": (4,)},
    {"phm_rule": (2, 2, 2), "W_left": (2, 2, 1), "W_right": (2, 1, 8), "b": (16,)},
)


def under(path: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{path}.{name}": shape for name, shape in shapes.items()}


def samplers(path: str, both: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]):
    return under(f"{path}.down_sampler", both[0]) | under(f"{path}.up_sampler", both[1])


CASES = {
    "lora": ("t5", "LoRA(rank=2, alpha=6)", under(f"{T5}q.lora", {"lora_A": (2, 16), "lora_B": (16, 2)})),
    "lora-bert": ("bert", "LoRA(rank=2)", under(f"{BERT}self.query.lora", {"lora_A": (2, 16), "lora_B": (16, 2)})),
    "adapter": ("t5", "Adapter(size=3)", under(f"{T5}o.adapter", BOTTLENECK)),
    "adapter-block": (
        "llama",
        'Adapter(size=3, activation="silu").at("block:out")',
        under("model.layers.0.adapter", BOTTLENECK),
    ),
    "parallel_adapter": (
        "t5",
        "ParallelAdapter(size=3, scale=2.0)",
        under(f"{FF[:-1]}.parallel_adapter", BOTTLENECK),
    ),
    "parallel_adapter-scale": (
        "t5",
        "ParallelAdapter(size=3, scale=Ones())",
        under(f"{FF[:-1]}.parallel_adapter", BOTTLENECK),
    ),
    "parallel_adapter-bert": (
        "bert",
        'ParallelAdapter(size=3, activation="gelu_tanh").at("ffn[0]")',
        under("bert.encoder.layer.0.intermediate.dense.parallel_adapter", BOTTLENECK),
    ),
    "compacter": ("t5", "Compacter(size=4, n=2)", samplers(f"{T5}o.compactor", PHM)),
    "low_rank_adapter": (
        "bert",
        "LowRankAdapter(size=4, rank=1)",
        samplers(f"{BERT}output.dense.low_rank_adapter", LOW),
    ),
    "bitfit": ("bert", "BitFit()", {f"{BERT}self.query.bias": (16,), f"{BERT}output.LayerNorm.bias": (16,)}),
    "soft_prompt": ("t5", "PromptTuning(length=3)", {"encoder.soft_prompt_layer.soft_embeds": (3, 16)}),
    "soft_prompt-llama": ("llama", "PromptTuning(length=3)", {"soft_prompt_layer.soft_embeds": (3, 16)}),
}
FIELDS = {
    "delta_type", "modified_modules", "exclude_modules", "common_structure", "backbone_class", "backbone_checkpoint_name",
    "backbone_hash", "opendelta_version", "transformers_version",
}  # fmt: skip


def scored(model, weights):
    """Return the scores with the weights attached."""
    with dt.attach(model, weights), torch.no_grad():
        return scores(model)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_reads_as_the_same_function(case, tmp_path):
    name, text, shapes = CASES[case]
    model = BUILDS[name]()
    weights = busy(dt.init(dt.parse(text), model), size=0.3)
    formats.write("opendelta", model, weights, tmp_path)
    with torch.no_grad():
        bare = scores(model)
    expected = scored(model, weights)
    assert (expected - bare).abs().max() > 1e-3
    torch.testing.assert_close(scored(model, formats.read(model, tmp_path)), expected, rtol=0, atol=1e-6)
    held = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert {key: tuple(held[key].shape) for key in shapes} == shapes
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.keys() >= FIELDS
    assert config["delta_type"] == case.partition("-")[0]


REFUSED = {
    "method": ("t5", "IA3()", "none for IA3"),
    "types": ("t5", "LoRA(rank=2) + Adapter(size=3)", "one delta_type in a folder"),
    "settings": ("t5", 'LoRA(rank=2).at("attn.q") + LoRA(rank=3).at("attn.v")', "one set of settings"),
    "twice": ("t5", "LoRA(rank=2) + LoRA(rank=2)", "this delta has several at"),
    "fixed": ("t5", "LoRA(rank=2, init=PiSSA())", "fixed leaves beside it"),
    "part": ("gpt2", "BitFit().at('attn.q')", "whole modules"),
    "transposed": ("gpt2", "LoRA(rank=2).at('attn.o')", r"stored \[out, in\]"),
    "activation": ("t5", 'Adapter(size=3, activation="identity")', "no activation for"),
    "side": ("t5", 'Adapter(size=3).at("ffn:in")', "what whole modules return"),
    "end": ("bert", 'Adapter(size=3).at("ffn:out")', "what whole modules return"),
    "size": ("t5", "LowRankAdapter(size=7)", "by a whole number"),
    "rank": ("t5", "LowRankAdapter(size=4, rank=2)", "of rank 1 alone"),
    "head": ("t5", 'LoRA(rank=2).at("head")', "leaves out 'lm_head'"),
    "added": ("t5", "BitFit()", "OpenDelta adds none to a linear layer"),
    "prompt": ("bert", "PromptTuning(length=3)", "moves the positions of the text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_opendelta_cannot_say_is_refused_and_nothing_written(case, tmp_path):
    name, text, words = REFUSED[case]
    model = BUILDS[name]()
    with pytest.raises(dt.DeltaTuneError, match=words):
        formats.write_opendelta(model, dt.init(dt.parse(text), model), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    model = t5()
    weights = busy(dt.init(dt.LoRA(rank=2), model), size=float("inf"))
    with pytest.raises(dt.DeltaTuneError, match="NaN or infinity"):
        formats.write_opendelta(model, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()
