"""The library `adapters` itself, in another process: it computes what deltatune wrote, and deltatune what it wrote."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune as dt
from deltatune.core.site import anatomy
from deltatune.formats.adapterhub import read_adapterhub, write_adapterhub
from deltatune.formats.adapterhub.places import BEFORE, BEHIND, BERTS, spots
from tests import tiny
from tests.formats.small import scores
from tests.laws.cases import busy

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-adapters" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="needs the library adapters in .venv-adapters: run `make .venv-adapters/.ready`"
)

ALL = (*BEHIND, *BEFORE)
FAMILIES = tuple(family.replace("-", "_") for family in ALL)
UNPACKED = tuple(family for family in ALL if family != "gpt2")
ROTARY = ("llama", "mistral")
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "houlsby": (ALL, 'Adapter(size=5, activation="silu")'),
    "some": (ALL, 'Adapter(size=4).at("ffn.down[1:]")'),
    "split": (ALL, 'Adapter(size=4, activation="gelu").at("{attn.o[0],ffn.down[1:]}")'),
    "ffn": (UNPACKED, 'LoRA(rank=2, alpha=3).at("ffn.{up,down}")'),
    "lora": (UNPACKED, "LoRA(rank=2, alpha=6)"),
    "upper": (UNPACKED, 'LoRA(rank=2).at("{attn.{k,v},cross.{k,v}?}[1:]")'),
    "ia3": (UNPACKED, 'IA3().at("{attn.{k,v},cross.{k,v}?,ffn.up}:out")'),
    "union": (UNPACKED, "LoRA(rank=2) + Adapter(size=4)"),
    "reft": (ALL, "AtPositions(LoReFT(rank=2), first=2)"),
    "noreft": (ALL, "AtPositions(NoReFT(rank=2), first=2)"),
    "compacter": (ALL, "Compacter(size=8, n=4)"),
    "ends": (BERTS, "AtPositions(LoReFT(rank=2), first=2) + AtPositions(LoReFT(rank=2), last=1)"),
    "flat": (BERTS, "PrefixTuning(length=3)"),
    "late": (BERTS, 'PrefixTuning(length=3).at("attn[1:]")'),
    "prefix": (BERTS, "Reparam(PrefixTuning(length=3), MLP(size=32, hidden=6))"),
    "mam": (BERTS, "PrefixTuning(length=3) + ParallelAdapter(size=5, scale=4.0)"),
    "parallel": (tuple(BEHIND), "ParallelAdapter(size=5, scale=2.0)"),
    "scale": (tuple(BEHIND), "ParallelAdapter(size=5, scale=Ones())"),
    "pfeiffer": ((*BERTS, "distilbert"), "AddNormAdapter(size=5)"),
    "sum": (("bart",), "AddNormAdapter(size=5, eps=1e-5)"),
    "norm": (BERTS, 'Adapter(size=5).at("path:**.output.LayerNorm")'),
    "last": (("distilbert", "bart"), 'Adapter(size=5).at("path:**.{output,final}_layer_norm?")'),
    "block": (BEFORE, 'Adapter(size=5).at("block")'),
    "dora": ((*ROTARY, "t5", "mt5"), "DoRA(rank=2, alpha=2)"),
    "invertible": (BERTS, 'InvertibleAdapter().at("path:**.embeddings.LayerNorm")'),
    "inverted": (ROTARY, 'InvertibleAdapter().at("embed")'),
    "language": (BERTS, 'Adapter(size=4).at("ffn.down") + InvertibleAdapter().at("path:**.embeddings.LayerNorm")'),
    "spoken": (ROTARY, 'Adapter(size=4).at("block") + InvertibleAdapter().at("embed")'),
}


def build(name: str) -> nn.Module:
    return tiny.FAMILIES[name.partition("-")[0]]()


def save_backbone(model: nn.Module, folder: Path) -> None:
    """Save a model so that transformers 4 computes the same of it: of mT5, where 4 alone scales what a tied head reads, untied."""
    if model.config.model_type == "mt5":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)


def weights_of(model: nn.Module, text: str) -> dt.Weights:
    """Return weights moved away from their start; add-norm adapters get the norms of the backbone, as the library has them."""
    weights = busy(dt.init(dt.parse(text), model), size=0.2)
    if not weights.fixed:
        return weights
    norms = {spot.sublayer: model.get_submodule(spot.norm) for spot in spots(anatomy(model))}
    fixed: dict[str, Tensor] = {}
    for placement in dt.sites(model, weights.delta).placements:
        norm = norms[placement.site.path]
        fixed |= {placement.name("g"): norm.weight.detach(), placement.name("b"): norm.bias.detach()}
    return replace(weights, fixed=fixed)


def written(folder: Path) -> dict[str, dt.Weights]:
    """Write every backbone, and an adapter of every kind on each; return the weights by the adapters' names."""
    for name in FAMILIES:
        save_backbone(build(name), folder / "backbones" / name)
    made = {}
    for kind, (families, text) in KINDS.items():
        for name in (f"{family.replace('-', '_')}-{kind}" for family in families):
            made[name] = weights_of(build(name), text)
            write_adapterhub(build(name), made[name], folder / "ours" / name)
    return made


@torch.no_grad()
def gap(name: str, weights: dt.Weights, folder: Path) -> float:
    """Return how far our scores are from the library's, in units of the largest one where that is above one."""
    model, expected = build(name), load_file(folder / "scores.safetensors")["scores"]
    given = tiny.batch(model)
    assert (scores(model, given) - expected).abs().max() > 1e-2, name
    with dt.attach(model, weights):
        return float((scores(model, given) - expected).abs().max() / expected.abs().max().clamp(min=1))


def test_deltatune_and_the_library_compute_the_same_of_each_other_s_folders(tmp_path):
    ours = written(tmp_path)
    command = [str(PYTHON), "-m", "tests.formats.adapterhub_peer", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = {path.name: read_adapterhub(build(path.name), path) for path in sorted((tmp_path / "theirs").iterdir())}
    for direction, made in (("ours", ours), ("theirs", theirs)):
        assert {name.partition("-")[0] for name in made} == set(FAMILIES)
        gaps = {name: gap(name, weights, tmp_path / direction / name) for name, weights in made.items()}
        assert {name: far for name, far in gaps.items() if not far <= 1e-5} == {}, direction
