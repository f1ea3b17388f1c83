"""The library `adapters` itself, in another process: it computes what deltatune wrote, and deltatune what it wrote."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

import deltatune as dt
from deltatune.core.site import anatomy
from deltatune.formats.adapterhub import read_adapterhub, write_adapterhub
from deltatune.formats.adapterhub.places import BEFORE, BEHIND, BERTS, spots
from tests.formats.live import Kinds, assert_same, exchange, moved, needs_others

pytestmark = needs_others

ALL = (*BEHIND, *BEFORE)
UNPACKED = tuple(family for family in ALL if family != "gpt2")
ROTARY = ("llama", "mistral")
KINDS: Kinds = {
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
    "turned": (BERTS, "AtPositions(LoReFT(rank=2), last=1) + AtPositions(LoReFT(rank=2), first=2)"),
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


def _name(family: str) -> str:
    return family.replace("-", "_")


def weights_of(model: nn.Module, text: str) -> dt.Weights:
    """Return weights moved away from their start; add-norm adapters get the norms of the backbone, as the library has them."""
    weights = moved(model, text)
    if not weights.fixed:
        return weights
    norms = {spot.sublayer: model.get_submodule(spot.norm) for spot in spots(anatomy(model))}
    fixed: dict[str, Tensor] = {}
    for placement in dt.sites(model, weights.delta).placements:
        norm = norms[placement.site.path]
        fixed |= {placement.name("g"): norm.weight.detach(), placement.name("b"): norm.bias.detach()}
    return replace(weights, fixed=fixed)


def test_deltatune_and_the_library_compute_the_same_of_each_other_s_folders(tmp_path):
    kinds = {kind: ([_name(family) for family in families], text) for kind, (families, text) in KINDS.items()}
    gaps = exchange("adapterhub", tmp_path, kinds, write_adapterhub, read_adapterhub, weights_of)
    for way in ("ours", "theirs"):
        assert {name.split("/")[1].split("-")[0] for name in gaps if name.startswith(way)} == {*map(_name, ALL)}
    assert_same(gaps)
