"""Where the library puts what, as roles: a block's attention, cross attention and feed-forward, and the norms around them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from deltatune.core.site import Anatomy, Place
from deltatune.errors import DeltaTuneError
from deltatune.formats.paths import resolve

BERTS = ("bert", "roberta", "xlm-roberta", "electra")
LAYERS = {"attention_adapters": "attn", "cross_attention_adapters": "cross", "output_adapters": "ffn"}
LAST = {"attn": "attn.o", "cross": "cross.o", "ffn": "ffn.down"}  # the layer that ends a sub-layer
FLAGS = {"attn": "mh_adapter", "cross": "cross_adapter", "ffn": "output_adapter"}
BERT = {"attn": "attention.output.LayerNorm", "cross": "crossattention.output.LayerNorm", "ffn": "output.LayerNorm"}
BART = {"attn": "self_attn_layer_norm", "cross": "encoder_attn_layer_norm", "ffn": "final_layer_norm"}
# families with norms behind the sub-layers: their paths in a block; and those with norms before them
BEHIND = {
    **dict.fromkeys(BERTS, BERT),
    "distilbert": {"attn": "sa_layer_norm", "ffn": "output_layer_norm"},
    "bart": BART,
}
BEFORE = ("llama", "mistral", "t5", "mt5", "gpt2", "mbart")


@dataclass(frozen=True)
class Spot:
    """One sub-layer of one block: the paths of the block, of the sub-layer, of its last linear, and of the norm behind it."""

    kind: str
    block: Place
    sublayer: str
    last: str
    norm: str | None


def check_family(parts: Anatomy) -> None:
    """Raise `DeltaTuneError` for a family whose norms are not known here."""
    if parts.family not in BEHIND and parts.family not in BEFORE:
        known = ", ".join([*BEHIND, *BEFORE])
        raise DeltaTuneError(
            f"where the library `adapters` acts in {parts.family} is not known here; files are read and written for {known}."
        )


def spots(parts: Anatomy) -> list[Spot]:
    """Return every sub-layer of the model, block by block in the library's order of layers."""
    norms = BEHIND.get(parts.family, {})
    found = []
    for block in parts.places:
        if block.role != "block":
            continue
        inside = [place for place in parts.places if place.path.startswith(f"{block.path}.")]
        for kind, role in LAST.items():
            last = next((place.path for place in inside if place.role == role), None)
            sublayer = next((place.path for place in inside if place.role == kind), None)
            if last is not None and sublayer is not None:
                norm = f"{block.path}.{norms[kind]}" if kind in norms else None
                found.append(Spot(kind, block, sublayer, last, norm))
    return found


def spot_of(model: nn.Module, parts: Anatomy, at: str) -> Spot:
    """Return the sub-layer that a module of the library's adapters, as its keys name it, belongs to."""
    parent, _, name = at.rpartition(".")
    path = resolve(model, parent if name in LAYERS else at)
    mine = [
        spot
        for spot in spots(parts)
        if (spot.block.path == path and spot.kind == LAYERS.get(name))
        or (name not in LAYERS and spot.last.startswith(f"{path}.") and spot.block.path != path)
    ]
    if len(mine) != 1:
        raise DeltaTuneError(f"the file has an adapter at {at!r}, which is no sub-layer of this {parts.family}.")
    return mine[0]


def key_of(parts: Anatomy, spot: Spot) -> str:
    """Return the path under which the library keeps the adapters of a sub-layer."""
    if parts.family in ("t5", "mt5"):
        return spot.sublayer.rpartition(".")[0]
    if parts.family in BERTS:
        return spot.last.rpartition(".")[0]
    name = next(name for name, kind in LAYERS.items() if kind == spot.kind)
    return f"{spot.block.path}.{name}"


def layer_number(parts: Anatomy, block: Place) -> int:
    """Return the number of a block as the library counts them: a decoder's behind its encoder's."""
    counts = [stack.layers for stack in parts.stacks]
    before = next((i for i, stack in enumerate(parts.stacks) if stack.name == block.stack), 0)
    return sum(counts[:before]) + (block.layer or 0)
