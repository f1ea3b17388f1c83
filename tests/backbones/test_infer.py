"""Inference must find what the hand-written tables say, and leave out what a structure does not tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from deltatune.backbones.infer import infer
from deltatune.backbones.infer_block import Linear, attentions, block_roles
from deltatune.backbones.resolve import resolve
from deltatune.backbones.sublayers import with_spans
from deltatune.core.site import Anatomy, Heads, Part, Place
from tests import tiny

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HEADS = Heads(query=4, key=4, width=8)
# what the names of a Phi-3 do not tell: how its packed modules are laid out
UNDECIDED = {"phi3": {"attn.q", "attn.k", "attn.v", "ffn.gate", "ffn.up"}}


def inferred(model: nn.Module) -> Anatomy | None:
    found = infer(dict(model.named_modules(remove_duplicate=False)), "")
    return found and replace(found, places=with_spans(found.places))


def build(name: str, head: str = "ForCausalLM", **config: Any) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, name + head)(getattr(transformers, f"{name}Config")(**config))


def roles(found: Anatomy) -> dict[str, list[str]]:
    names = dict.fromkeys(place.role for place in found.places)
    return {name: [place.path for place in found.places if place.role == name] for name in names}


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_inference_equals_the_table(name: str) -> None:
    model = tiny.FAMILIES[name]()
    table, found = resolve(model), inferred(model)
    expected = {p for p in table.places if p.role != "head" and p.role not in UNDECIDED.get(name, ())}
    assert set(found.places) == expected
    assert len(found.places) == len(expected)
    assert found.stacks == table.stacks
    assert found.family == table.family


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("Olmo2", SMALL, {"attn.q": "model.layers.0.self_attn.q_proj", "ffn.gate": "model.layers.0.mlp.gate_proj"}),
        ("Starcoder2", SMALL, {"attn.o": "model.layers.0.self_attn.o_proj", "ffn.up": "model.layers.0.mlp.c_fc"}),
        ("StableLm", SMALL, {"ffn": "model.layers.0.mlp", "ffn.down": "model.layers.0.mlp.down_proj"}),
        (
            "GPTNeo",
            {
                "vocab_size": 64,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "attention_types": [[["global"], 2]],
            },
            {"attn": "transformer.h.0.attn.attention", "attn.v": "transformer.h.0.attn.attention.v_proj"},
        ),
    ],
)
def test_families_without_a_table_are_read_from_their_structure(
    name: str, config: dict[str, Any], expected: dict[str, str]
) -> None:
    found = roles(resolve(build(name, **config)))
    assert {role: found[role][0] for role in expected} == expected
    assert [len(found[role]) for role in ("block", "attn.q", "attn.k", "attn.v", "attn.o", "ffn.down")] == [2] * 6


def test_an_encoder_decoder_without_a_table_has_two_stacks() -> None:
    sides = {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))
    }
    config = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48} | sides
    found = resolve(build("Pegasus", "ForConditionalGeneration", **config))
    assert [(stack.name, stack.causal, stack.layers) for stack in found.stacks] == [
        ("encoder", False, 2),
        ("decoder", True, 2),
    ]
    assert Place("cross.q", "model.decoder.layers.1.encoder_attn.q_proj", "decoder", 1) in found.places
    assert len(roles(found)["embed"]) == 2


def test_known_packings_are_split_and_others_are_not() -> None:
    bloom = resolve(build("Bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    assert {p.part for p in bloom.places if p.role == "attn.k"} == {Part(4, 8, 16)}
    starcoder = roles(resolve(build("GPTBigCode", vocab_size=64, n_embd=32, n_layer=2, n_head=4)))
    assert "attn" in starcoder and "attn.o" in starcoder
    assert not {"attn.q", "attn.k", "attn.v"} & set(starcoder)


def test_alibi_is_not_taken_for_learned_positions() -> None:
    assert resolve(build("Bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).stacks[0].positions == "bias"


def test_a_mixture_of_experts_has_no_feed_forward_role() -> None:
    found = roles(resolve(build("Mixtral", **SMALL, num_key_value_heads=2, num_local_experts=2)))
    assert len(found["attn.q"]) == 2
    assert not [role for role in found if role.startswith("ffn")]


def test_attention_that_only_some_blocks_have_is_found_there_and_the_feed_forward_left_out() -> None:
    found = resolve(build("RecurrentGemma", **SMALL | {"num_hidden_layers": 3}, lru_width=32))
    assert [place.layer for place in found.places if place.role == "attn.q"] == [2]
    assert not [place for place in found.places if place.role.startswith("ffn")]


def test_a_model_without_attention_still_has_blocks_norms_and_ends() -> None:
    found = roles(resolve(build("Mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2)))
    assert {role: len(paths) for role, paths in found.items()} == {"embed": 1, "block": 2, "norm": 3, "head": 1}


def test_a_module_that_holds_the_attention_too_is_not_the_feed_forward() -> None:
    found = resolve(build("Albert", "ForMaskedLM", **SMALL, embedding_size=16))
    assert found
    ends = [(p.path.rpartition(".")[2], (p.exit or "").rpartition(".")[2]) for p in found.places if p.role == "ffn"]
    assert ends == [("ffn", "ffn_output")]


def test_lists_of_lists_are_not_blocks() -> None:
    config = {"vocab_size": 64, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1]}
    assert resolve(build("Funnel", "ForMaskedLM", **config)) is None


def test_blocks_of_a_subclass_count_as_the_same_type() -> None:
    model: Any = build("Olmo2", **SMALL)
    before = resolve(model)
    block = model.model.layers[1]
    block.__class__ = type("Attached", (type(block),), {})
    assert resolve(model) == before


def test_a_square_feed_forward_is_told_apart_by_name() -> None:
    q, k, v, o = (Linear(f"attn.{name}_proj", 32, 32) for name in "qkvo")
    named = block_roles([q, k, v, o, Linear("fc1", 32, 32), Linear("fc2", 32, 32)], 32, HEADS)
    assert [(role, path) for role, path, _ in named if role.startswith("ffn")] == [
        ("ffn.down", "fc2"),
        ("ffn.up", "fc1"),
    ]
    nameless = block_roles([q, k, v, o, Linear("a", 32, 32), Linear("b", 32, 32)], 32, HEADS)
    assert not [role for role, _, _ in nameless if role.startswith("ffn")]


def test_a_gate_is_not_guessed() -> None:
    linears = [Linear("mlp.a", 32, 48), Linear("mlp.b", 32, 48), Linear("mlp.c", 48, 32)]
    assert [role for role, _, _ in block_roles(linears, 32, HEADS)] == ["ffn.down", "ffn"]


def test_two_attentions_of_one_kind_leave_the_role_out() -> None:
    linears = [Linear(f"{parent}.q_proj", 32, 32) for parent in ("first", "second")]
    assert attentions(linears, cross=False) == ["first", "second"]
    assert not block_roles(linears, 32, HEADS)


def test_a_packing_whose_rows_do_not_fit_the_heads_is_left_out() -> None:
    linears = [Linear("attn.query_key_value", 32, 48), Linear("attn.dense", 32, 32)]
    assert [role for role, _, _ in block_roles(linears, 32, Heads(4, 1, 8))] == ["attn", "attn.o"]
