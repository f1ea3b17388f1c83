"""torchtune, litgpt, loralib and pyreft, built from their layouts, against their formulas on the live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune import formats
from tests import tiny
from tests.formats.small import bert, llama, scores
from tests.reference.compare import TOLERANCE
from tests.reference.compare import scores as long_scores


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def added(model: nn.Module, path: str, change: Tensor) -> None:
    """Add a change to a weight of the reference."""
    with torch.no_grad():
        model.get_submodule(path).weight.add_(change)


def rows(width: int, heads: int) -> list[int]:
    """Return where torchtune keeps every feature: half a head apart in transformers, side by side there."""
    half = width // 2
    return [h * width + (2 * i if i < half else 2 * (i - half) + 1) for h in range(heads) for i in range(width)]


def torchtune(tmp_path: Path, reference: nn.Module) -> Path:
    tensors = {}
    for layer in range(2):
        for theirs, ours, d_out, d_in, heads in (
            ("attn.q_proj", "self_attn.q_proj", 16, 16, 2),
            ("attn.k_proj", "self_attn.k_proj", 8, 16, 1),
            ("attn.output_proj", "self_attn.o_proj", 16, 16, 0),
            ("mlp.w1", "mlp.gate_proj", 24, 16, 0),
            ("mlp.w2", "mlp.down_proj", 16, 24, 0),
        ):
            A, B = noise(2, d_in, seed=layer), noise(d_out, 2, seed=layer)
            added(reference, f"model.layers.{layer}.{ours}", 3 * B @ A)
            kept = torch.empty_like(B)
            kept[rows(8, heads) if heads else list(range(d_out))] = B
            tensors |= {f"layers.{layer}.{theirs}.lora_a.weight": A, f"layers.{layer}.{theirs}.lora_b.weight": kept}
    torch.save(tensors, tmp_path / "adapter_model.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "peft_type": "LORA"}))
    return tmp_path


@torch.no_grad()
def test_torchtune_s_heads_are_sorted_as_the_model_has_them(tmp_path):
    model, reference = llama(), llama()
    folder = torchtune(tmp_path, reference)
    with dt.load(model, folder):
        torch.testing.assert_close(scores(model), scores(reference), **TOLERANCE)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(dt.DeltaTuneError, match="no numbers of a LoRA"):
        dt.load(model, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(dt.DeltaTuneError, match="without its r and lora_alpha"):
        dt.load(model, folder)
    with pytest.raises(dt.DeltaTuneError, match="read for llama, mistral, qwen2; this is bert"):
        dt.load(bert(), folder)


@torch.no_grad()
def test_torchtune_s_magnitudes_are_those_of_dora(tmp_path):
    A, B, m = noise(2, 16), noise(16, 2), noise(16).abs() + 0.5
    order = rows(8, 2)
    kept, size = torch.empty_like(B), torch.empty_like(m)
    kept[order], size[order] = B, m
    names = ("lora_a.weight", "lora_b.weight", "magnitude")
    tensors = {f"layers.1.attn.q_proj.{n}": t for n, t in zip(names, (A, kept, size), strict=True)}
    torch.save(tensors, tmp_path / "adapter_model.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    model, reference = llama(), llama()
    layer: Any = reference.get_submodule("model.layers.1.self_attn.q_proj")
    V = layer.weight.detach() + B @ A
    layer.weight.copy_(m[:, None] * V / V.norm(dim=1, keepdim=True))
    with dt.load(model, tmp_path):
        torch.testing.assert_close(scores(model), scores(reference), **TOLERANCE)


def test_what_torchtune_computes_otherwise_is_refused(tmp_path):
    rows = {"lora_a.weight": noise(2, 32), "lora_b.weight": noise(16, 2), "magnitude": noise(16)}
    torch.save({f"layers.0.attn.v_proj.{name}": tensor for name, tensor in rows.items()}, tmp_path / "adapter_model.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    with pytest.raises(dt.DeltaTuneError, match="DoRA rescales the bias of a layer"):
        formats.read(tiny.qwen2(), tmp_path)


def test_what_torchtune_exports_for_peft_is_read_where_its_own_file_cannot_be(tmp_path):
    model = tiny.gemma()
    weights = dt.init(dt.LoRA(rank=2), model)
    formats.write_peft(model, weights, tmp_path)
    torch.save({}, tmp_path / "adapter_model.pt")
    assert formats.read(model, tmp_path).count == weights.count


@torch.no_grad()
def test_litgpt_s_packed_factors_become_one_lora_for_each_role(tmp_path):
    A, B, C, D = noise(4, 16), noise(24, 2), noise(2, 16), noise(24, 2, seed=1)
    keys = {"transformer.h.1.attn.qkv.lora_A": A, "transformer.h.1.attn.qkv.lora_B": B}
    keys |= {"transformer.h.0.mlp.fc_1.lora_A": C, "transformer.h.0.mlp.fc_1.lora_B": D}
    torch.save({"model": keys}, tmp_path / "lit_model.pth.lora")
    lines = "lora_r: 2\nlora_alpha: 6\nlora_query: true\nlora_key: false\nlora_value: true\n"
    (tmp_path / "hyperparameters.yaml").write_text(lines)
    model, reference = llama(), llama()
    added(reference, "model.layers.1.self_attn.q_proj", 3 * B[:16] @ A[:2])
    added(reference, "model.layers.1.self_attn.v_proj", 3 * B[16:] @ A[2:])
    added(reference, "model.layers.0.mlp.gate_proj", 3 * D @ C)
    for path in (tmp_path, tmp_path / "lit_model.pth.lora"):
        with dt.load(model, path):
            torch.testing.assert_close(scores(model), scores(reference), **TOLERANCE)
    (tmp_path / "hyperparameters.yaml").write_text(lines.replace("lora_value: true", "lora_value: false"))
    with pytest.raises(dt.DeltaTuneError, match="no LoRA of the rank 2 for attn.q"):
        dt.load(model, tmp_path)
    (tmp_path / "hyperparameters.yaml").unlink()
    with pytest.raises(dt.DeltaTuneError, match="no lines lora_r and lora_alpha"):
        dt.load(model, tmp_path)
    (tmp_path / "lit_model.pth.lora").rename(tmp_path / "lit_model.pth.adapter")
    with pytest.raises(dt.DeltaTuneError, match="a gate for each head"):
        dt.load(model, tmp_path)


@torch.no_grad()
def test_loralib_s_file_needs_its_alpha_and_packed_modules_their_parts(tmp_path):
    A, B = noise(4, 32), noise(64, 2)
    file = tmp_path / "lora.pt"
    torch.save({"transformer.h.0.attn.c_attn.lora_A": A, "transformer.h.0.attn.c_attn.lora_B": B}, file)
    model, reference = tiny.gpt2(), tiny.gpt2()
    with pytest.raises(dt.DeltaTuneError, match="does not say the alpha"):
        dt.load(model, file)
    with pytest.raises(
        dt.DeltaTuneError, match=r"packs attn.q, attn.k, attn.v, and the file has factors for 2 of them"
    ):
        formats.read_loralib(model, file, alpha=4)
    weight = reference.get_submodule("transformer.h.0.attn.c_attn").weight  # stored [in, out]
    weight[:, :32].add_(2 * (B[:32] @ A[:2]).T)
    weight[:, 64:].add_(2 * (B[32:] @ A[2:]).T)
    with dt.attach(model, formats.read_loralib(model, file, alpha=4, enabled=("q", "v"))):
        torch.testing.assert_close(long_scores(model), long_scores(reference), **TOLERANCE)
    torch.save({"cls.bias": noise(3)}, file)
    with pytest.raises(dt.DeltaTuneError, match="'cls.bias', which is no factor of a LoRA"):
        formats.read_loralib(model, file, alpha=4)
    with pytest.raises(dt.DeltaTuneError, match="holds no tensor that is called lora_A"):
        formats.read_loralib(model, file, check=False, alpha=4)


@torch.no_grad()
def test_loralib_s_plain_layers_are_read_from_safetensors_too(tmp_path):
    from safetensors.torch import save_file

    A, B = noise(2, 16), noise(16, 2)
    query = "encoder.layer.1.attention.self.query"
    save_file({f"{query}.lora_A": A, f"{query}.lora_B": B}, tmp_path / "lora.safetensors")
    model, reference = bert(), bert()
    added(reference, f"bert.{query}", 5 * B @ A)
    with dt.attach(model, formats.read_loralib(model, tmp_path / "lora.safetensors", alpha=10)):
        torch.testing.assert_close(scores(model), scores(reference), **TOLERANCE)


def reft(tmp_path: Path, kind: str, spots: list[tuple[int, str]], held: dict[str, Tensor]) -> Path:
    """Write a folder as pyreft does, one intervention in a layer and at a component for each of some spots."""
    config = {
        "representations": [[layer, component, "pos", 1, 2, *[None] * 9] for layer, component in spots],
        "intervention_types": [f"<class 'pyreft.interventions.{kind}Intervention'>"] * len(spots),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for k, (layer, component) in enumerate(spots):
        at = f"comp_{component.replace('.', '_')}" if "." in component else f"layer_{layer}_comp_{component}"
        torch.save(held, tmp_path / f"intkey_{at}_unit_pos_nunit_1#{spots[:k].count((layer, component))}.bin")
    return tmp_path


@torch.no_grad()
def test_pyreft_acts_where_its_reader_is_told(tmp_path):
    R = torch.linalg.qr(noise(16, 2))[0]
    W, b = noise(2, 16), noise(2)
    unit = {"weight": W, "bias": b, "rotate_layer": R}
    folder, model, reference = reft(tmp_path, "Loreft", [(1, "bert.encoder.layer[1].output")], unit), bert(), bert()
    with pytest.raises(dt.DeltaTuneError, match="do not say at which positions they act"):
        dt.load(model, folder)
    lengths = (6, 4)

    def hook(m: nn.Module, args: Any, y: Any) -> Any:
        h = (y[0] if isinstance(y, tuple) else y).clone()
        for row, n in enumerate(lengths):
            for t in (0, n - 1):
                h[row, t] += (W @ h[row, t] + b - R.T @ h[row, t]) @ R.T
        return (h, *y[1:]) if isinstance(y, tuple) else h

    reference.get_submodule("bert.encoder.layer.1").register_forward_hook(hook)
    bare = scores(model)
    with dt.attach(model, formats.read_pyreft(model, folder, positions="f1+l1")):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)


def test_pyreft_s_other_kinds_are_told_apart_by_their_types(tmp_path):
    held = {"learned_source.weight": noise(2, 16), "learned_source.bias": noise(2), "proj_layer.weight": noise(2, 16)}
    spots = [(0, "block_output"), (1, "block_output")] * 2
    folder = reft(tmp_path, "Noreft", spots, held)
    texts = [str(term.method) for term in formats.read_pyreft(bert(), folder, positions="f2+l1").delta.terms]
    assert texts == ["AtPositions(inner=NoReFT(rank=2), first=2)", "AtPositions(inner=NoReFT(rank=2), last=1)"]
    reft(tmp_path, "Nodireft", spots, held)
    assert "DiReFT" in str(formats.read_pyreft(bert(), folder, positions="f2+l1").delta)
    for kind, again, words in (
        ("Consreft", spots, "read are those of LoReFT, NoReFT and NodiReFT"),
        ("Loreft", spots, "read are those of LoReFT, NoReFT and NodiReFT, whole"),
        ("Noreft", [(0, "mlp_output")], "'mlp_output'; deltatune has ReFT at positions behind blocks"),
        ("Noreft", [(0, "bert.encoder.layer[0].input")], "deltatune has ReFT at positions behind blocks"),
        ("Noreft", [(0, "bert.encoder.layer[7].output")], "names the module 'bert.encoder.layer.7'"),
        ("Noreft", spots + spots[:1], "at most two may be behind one block"),
    ):
        reft(tmp_path, kind, again, held)
        with pytest.raises(dt.DeltaTuneError, match=words):
            formats.read_pyreft(bert(), folder, positions="f2+l1")
