"""OpenDelta's folders, built from its layout of keys, against its formulas written out on the live model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deltatune as dt
from deltatune.formats.opendelta import read_opendelta
from tests.formats.small import BUILDS, batch, bert, scores, t5

Q, FF = "encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense"
BLOCK = "encoder.block.0.layer.1.DenseReluDense"


def folder(tmp_path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """Write a folder as OpenDelta does."""
    (tmp_path / "config.json").write_text(json.dumps({"delta_type": "some", "opendelta_version": "0.3.2", **config}))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    return tmp_path


def noise(*shape: int) -> Tensor:
    return 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def behind(model: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> None:
    model.get_submodule(path).register_forward_hook(lambda m, args, y: y + change(y))  # type: ignore[operator]


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def lora() -> tuple[dict[str, Tensor], dict[str, Any], Callable[[nn.Module], None]]:
    A, B, A2, B2 = noise(2, 16), noise(16, 2), noise(2, 16) + 0.1, noise(16, 2) - 0.1
    keys = {f"{Q}.lora.lora_A": A, f"{Q}.lora.lora_B": B, f"{Q}.lora_1.lora_A": A2, f"{Q}.lora_1.lora_B": B2}

    def put(model: nn.Module) -> None:
        model.get_submodule(Q).register_forward_hook(
            lambda m, args, y: y + 3 * (args[0] @ A.T @ B.T + args[0] @ A2.T @ B2.T)
        )

    return keys, {"lora_r": 2, "lora_alpha": 6}, put


def adapter(where: str) -> tuple[dict[str, Tensor], dict[str, Any], Callable[[nn.Module], None]]:
    D, d, U, u = noise(3, 16), noise(3), noise(16, 3), noise(16)
    names = ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias")
    keys = {f"{where}.adapter.modulelist.{n}": t for n, t in zip(names, (D, d, U, u), strict=True)}
    return (
        keys,
        {"non_linearity": "gelu_new"},
        lambda model: behind(model, where, lambda y: tanh_gelu(y @ D.T + d) @ U.T + u),
    )


def parallel() -> tuple[dict[str, Tensor], dict[str, Any], Callable[[nn.Module], None]]:
    D, d, U, u = noise(3, 16), noise(3), noise(16, 3), noise(16)
    names = ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias")
    keys = {f"{FF}.wi.parallel_adapter.modulelist.{n}": t for n, t in zip(names, (D, d, U, u), strict=True)}

    def put(model: nn.Module) -> None:
        model.get_submodule(FF).register_forward_hook(lambda m, args, y: y + torch.relu(args[0] @ D.T + d) @ U.T + u)

    return keys, {"non_linearity": "relu", "modified_modules": ["wi", "wo"], "scaled": None}, put


def around() -> tuple[dict[str, Tensor], dict[str, Any], Callable[[nn.Module], None]]:
    keys, _, _ = parallel()
    own = {name.replace(f"{FF}.wi", Q): tensor for name, tensor in keys.items()}
    D, d, U, u = own.values()

    def put(model: nn.Module) -> None:
        model.get_submodule(Q).register_forward_hook(lambda m, args, y: y + torch.tanh(args[0] @ D.T + d) @ U.T + u)

    return own, {"non_linearity": "tanh", "modified_modules": ["q", "q"]}, put


def compacter() -> tuple[dict[str, Tensor], dict[str, Any], Callable[[nn.Module], None]]:
    keys, matrices = {}, {}
    for side, (k, j), b in (("down_sampler", (8, 2), 4), ("up_sampler", (2, 8), 16)):
        rule, left, right, shift = noise(2, 2, 2), noise(2, k, 1), noise(2, 1, j), noise(b)
        for name, tensor in {"phm_rule": rule, "W_left": left, "W_right": right, "b": shift}.items():
            keys[f"{FF}.wo.compactor.{side}.{name}"] = tensor
        matrices[side] = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(2)), shift
    (D, d), (U, u) = matrices["down_sampler"], matrices["up_sampler"]
    return keys, {"non_linearity": "relu"}, lambda m: behind(m, f"{FF}.wo", lambda y: torch.relu(y @ D + d) @ U + u)


def low_rank(act: str) -> tuple[dict[str, Tensor], dict[str, Any], Callable[[nn.Module], None]]:
    L1, R1, b1, L2, R2, b2 = noise(16, 1), noise(1, 4), noise(4), noise(4, 1), noise(1, 16), noise(16)
    held = {"down_sampler": (L1, R1, b1), "up_sampler": (L2, R2, b2)}
    keys = {
        f"{FF}.wo.low_rank_adapter.{side}.{name}": t
        for side, own in held.items()
        for name, t in zip(("W_left", "W_right", "b"), own, strict=True)
    }
    f = tanh_gelu if act == "gelu_new" else torch.relu
    return keys, {"non_linearity": act}, lambda m: behind(m, f"{FF}.wo", lambda y: f(y @ L1 @ R1 + b1) @ L2 @ R2 + b2)


CASES = {
    "lora": (lora, {"LoRA(rank=2, alpha=6.0)"}),
    "adapter": (lambda: adapter(f"{FF}.wo"), {'Adapter(size=3, activation="gelu_tanh")'}),
    "adapter-of-a-sublayer": (lambda: adapter(BLOCK), {'Adapter(size=3, activation="gelu_tanh").at("encoder.ffn[0]")'}),
    "parallel": (parallel, {"ParallelAdapter(size=3, scale=1.0)"}),
    "around": (around, {'ParallelAdapter(size=3, scale=1.0, activation="tanh")'}),
    "compacter": (compacter, {'Adapter(size=4, activation="relu")'}),
    "low-rank": (lambda: low_rank("gelu_new"), {"LowRankAdapter(size=4)"}),
    "low-rank-relu": (lambda: low_rank("relu"), {'Adapter(size=4, activation="relu")'}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_folder_computes_the_formula(case, tmp_path):
    make, texts = CASES[case]
    keys, config, put = make()
    weights, model, reference = read_opendelta(t5(), folder(tmp_path, keys, **config)), t5(), t5()
    put(reference)
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-3
    torch.testing.assert_close(ours, scores(reference), rtol=0, atol=1e-5)
    assert {text.partition(".at(")[0] for text in texts} == {str(term.method) for term in weights.delta.terms}
    if case == "adapter-of-a-sublayer":
        assert str(weights.delta) in texts


@torch.no_grad()
def test_biases_are_differences_from_the_model_s_own_where_it_has_one(tmp_path):
    query, norm = "encoder.layer.0.attention.self.query", "encoder.layer.1.output.LayerNorm"
    keys = {f"{query}.bias": noise(16), f"{norm}.bitfit.bias": noise(16) + 0.2}
    model, reference = bert(), bert()
    reference.get_submodule(f"bert.{query}").bias.copy_(keys[f"{query}.bias"])
    reference.get_submodule(f"bert.{norm}").bias.add_(keys[f"{norm}.bitfit.bias"])
    with dt.attach(model, read_opendelta(bert(), folder(tmp_path, keys))):
        torch.testing.assert_close(scores(model), scores(reference), rtol=0, atol=1e-5)
    weights = read_opendelta(t5(), folder(tmp_path, {f"{Q}.bias": noise(16)}))
    assert torch.equal(next(iter(weights.tensors.values())), noise(16))


@torch.no_grad()
def test_a_soft_prompt_stands_in_front_of_the_encoder_s_text(tmp_path):
    P = noise(3, 16)
    model, reference = t5(), t5()
    with dt.attach(model, read_opendelta(t5(), folder(tmp_path, {"encoder.soft_prompt_layer.soft_embeds": P}))):
        ours = scores(model)
    given = batch(reference)
    words = torch.cat([P.expand(2, -1, -1), reference.shared(given.pop("input_ids"))], 1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), given.pop("attention_mask")], 1)
    expected = reference(inputs_embeds=words, attention_mask=mask, **given).logits.flatten(0, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    with pytest.raises(dt.DeltaTuneError, match="moves the positions of the text in bert"):
        read_opendelta(bert(), tmp_path)


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "prefix": ({"encoder.block.0.layer.0.reparams.wte.weight": noise(2, 2)}, {}, "counts it among the positions"),
    "whole": ({"shared.weight": noise(2, 2)}, {}, "'shared.weight', a parameter of the backbone"),
    "module": ({"decoder.gone.lora.lora_A": noise(8, 16)}, {}, "names the module 'decoder.gone'"),
    "half": ({f"{Q}.lora.lora_A": noise(8, 16)}, {}, "is not whole: 'lora_B'"),
    "rank": ({f"{Q}.lora.lora_A": noise(2, 16)}, {}, "lora_r=8 .* has the rank 2"),
    "activation": (adapter(BLOCK)[0], {"non_linearity": "mish"}, "the activation 'mish'"),
    "beside": (
        {n.replace("DenseReluDense.wi", "layer_norm"): t for n, t in parallel()[0].items()},
        {"modified_modules": ["layer_norm", "wo"]},
        "from .*layer_norm' to 'wo', which are the ends of no sub-layer",
    ),
    "low-rank": (
        {
            f"{Q}.low_rank_adapter.{side}_sampler.W_{end}": noise(2, 2)
            for side in ("down", "up")
            for end in ("left", "right")
        },
        {},
        "of rank 2; OpenDelta computes rank 1 alone",
    ),
    "nothing": ({}, {}, "holds no tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_named(case, tmp_path):
    keys, config, words = REFUSED[case]
    with pytest.raises(dt.DeltaTuneError, match=words):
        read_opendelta(t5(), folder(tmp_path, keys, **config))


@torch.no_grad()
def test_load_knows_the_folder_and_reads_no_code(tmp_path):
    keys, config, put = lora()
    model, reference = t5(), t5()
    put(reference)
    with dt.load(model, folder(tmp_path, keys, **config)):
        torch.testing.assert_close(scores(model), scores(reference), rtol=0, atol=1e-5)
    torch.save({"a": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(dt.DeltaTuneError, match="not a file of plain tensors, whole and without code"):
        dt.load(model, tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(dt.DeltaTuneError, match="there is no pytorch_model.bin"):
        dt.load(BUILDS["t5"](), tmp_path)
