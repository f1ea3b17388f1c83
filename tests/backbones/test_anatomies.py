"""Every family's table against the real modules: paths, roles, the module that attends, packed parts, wheres."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltatune.backbones.anatomies import Packed, families
from deltatune.core.site import Anatomy, Heads, Part, Place, anatomy
from deltatune.core.where import select
from deltatune.errors import DeltaTuneError
from tests import tiny

EVERYWHERE = {"embed", "block", "attn", "attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down", "norm", "head"}
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "t5", "mt5", "umt5"}
NO_FFN_MODULE = {"opt", "bert", "roberta", "xlm_roberta", "electra", "bart", "mbart"}
TWO_STACKS = {"t5", "mt5", "umt5", "bart", "mbart"}
NORMS = {"llama": 7, "qwen3": 9, "gemma2": 9, "gemma3": 13, "phi": 3, "t5": 12, "mbart": 14, "bart": 12}

family = pytest.mark.parametrize("name", tiny.FAMILIES)


@dataclass
class Call:
    """What one attention module handed to the attention function."""

    query: Tensor
    key: Tensor
    value: Tensor


def recorded(model: Any) -> dict[nn.Module, Call]:
    """Run the model with an attention function that keeps what it is called with, by module."""
    calls: dict[nn.Module, Call] = {}
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def recording(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
    ) -> Any:
        calls[module] = Call(query, key, value)
        return inner(module, query, key, value, mask, scaling=rest["scaling"])

    ALL_ATTENTION_FUNCTIONS.register("recording", recording)
    ALL_MASK_ATTENTION_FUNCTIONS.register("recording", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.config._attn_implementation = "recording"
    with torch.no_grad():
        model(**tiny.batch(model))
    return calls


def places(found: Anatomy, role: str, stack: str | None = None) -> list[Place]:
    return [place for place in found.places if place.role == role and stack in (None, place.stack)]


@family
def test_a_table_knows_the_family_and_every_path_exists(name: str) -> None:
    model = tiny.FAMILIES[name]()
    found = anatomy(model)
    assert model.config.model_type in families()
    assert found.family == model.config.model_type
    modules = dict(model.named_modules(remove_duplicate=False))
    for place in found.places:
        assert place.path in modules
    for stack in found.stacks:
        assert len(modules[stack.path]) == stack.layers
        assert isinstance(modules[stack.embed], nn.Embedding)


@family
def test_every_expected_role_has_a_place_in_every_block(name: str) -> None:
    found = anatomy(tiny.FAMILIES[name]())
    expected = EVERYWHERE | {"ffn"} | ({"ffn.gate"} if name in GATED else set())
    if name in TWO_STACKS:
        expected |= {"cross", "cross.q", "cross.k", "cross.v", "cross.o"}
    assert {place.role for place in found.places} == expected
    for role in expected - {"norm", "head", "embed"}:
        for stack in found.stacks:
            if role.startswith("cross") and stack.name == "encoder":
                continue
            assert [p.layer for p in places(found, role, stack.name)] == list(range(stack.layers)), (role, stack.name)


@pytest.mark.parametrize(("name", "count"), NORMS.items())
def test_every_norm_has_a_place(name: str, count: int) -> None:
    model = tiny.FAMILIES[name]()
    found = places(anatomy(model), "norm")
    assert len({place.path for place in found}) == len(found) == count
    inside_blocks = [place for place in found if place.layer is not None]
    assert all(f".{place.layer}." in place.path for place in inside_blocks)


@family
def test_attention_places_are_the_modules_that_call_the_attention_function(name: str) -> None:
    model = tiny.FAMILIES[name]()
    calls = recorded(model)
    found = anatomy(model)
    declared = {place.path for role in ("attn", "cross") for place in places(found, role)}
    called = {path for path, module in model.named_modules() if module in calls}
    assert declared == called


@family
def test_projections_give_what_the_attention_function_gets(name: str) -> None:
    # Rotary embeddings are the identity at position 0; some families scale, so only directions are compared.
    model = tiny.FAMILIES[name]()
    found = anatomy(model)
    outputs: dict[str, Tensor] = {}
    for place in found.places:
        module = model.get_submodule(place.path)
        module.register_forward_hook(lambda _m, _a, y, path=place.path: outputs.__setitem__(path, y))
    calls = recorded(model)
    normed = ("q", "k") if name in ("qwen3", "gemma3") else ()
    for place in found.places:
        role, _, what = place.role.partition(".")
        if role not in ("attn", "cross") or what not in ("q", "k", "v") or what in normed:
            continue
        holder = next(p for p in places(found, role, place.stack) if p.layer == place.layer)
        call = calls[model.get_submodule(holder.path)]
        got = {"q": call.query, "k": call.key, "v": call.value}[what][:, :, 0]
        output = outputs[place.path]
        mine = place.part.take(output, -1) if place.part else output
        mine = mine[:, 0].unflatten(-1, (-1, got.shape[-1]))
        assert mine.shape == got.shape
        assert torch.allclose(torch.cosine_similarity(mine, got, -1), torch.ones(()), atol=1e-5), place


@family
def test_heads_of_a_stack_are_those_of_its_attention(name: str) -> None:
    model = tiny.FAMILIES[name]()
    calls, found = recorded(model), anatomy(model)
    for stack in found.stacks:
        call = calls[model.get_submodule(places(found, "attn", stack.name)[0].path)]
        assert stack.heads == Heads(call.query.shape[1], call.key.shape[1], call.query.shape[-1])


@family
def test_blocks_and_stacks_carry_the_width_of_the_hidden_state(name: str) -> None:
    model = tiny.FAMILIES[name]()
    widths: dict[str, int] = {}
    found = anatomy(model)
    for place in places(found, "block"):

        def keep(_module: nn.Module, _args: Any, output: Any, path: str = place.path) -> None:
            widths[path] = (output[0] if isinstance(output, tuple) else output).shape[-1]

        model.get_submodule(place.path).register_forward_hook(keep)
    with torch.no_grad():
        model(**tiny.batch(model))
    for stack in found.stacks:
        assert {widths[place.path] for place in places(found, "block", stack.name)} == {stack.width}


@family
def test_causal_stacks_do_not_look_ahead(name: str) -> None:
    model = tiny.FAMILIES[name]()
    found = anatomy(model)
    stack = found.stacks[-1]
    given = tiny.batch(model)
    key = "decoder_input_ids" if name in TWO_STACKS else "input_ids"
    changed = given | {key: given[key].clone()}
    changed[key][0, -1] = 3 if given[key][0, -1] != 3 else 4
    with torch.no_grad():
        before, after = model(**given).logits[0, 0], model(**changed).logits[0, 0]
    assert torch.equal(before, after) is stack.causal


def test_gpt_neox_parts_are_the_rows_of_each_head() -> None:
    model: Any = tiny.gpt_neox()
    heads, width = tiny.HEADS, tiny.WIDTH // tiny.HEADS
    weight = model.gpt_neox.layers[1].attention.query_key_value.weight
    for index, what in enumerate("qkv"):
        place = next(p for p in places(anatomy(model), f"attn.{what}") if p.layer == 1)
        assert place.part == Part(heads, index * width, (index + 1) * width)
        by_hand = torch.cat([weight[h * 3 * width + index * width :][:width] for h in range(heads)])
        assert torch.equal(place.part.take(weight, 0), by_hand)


def test_gpt2_parts_are_thirds_of_a_transposed_weight() -> None:
    model: Any = tiny.gpt2()
    sites = select(model, "attn.{q,k,v}[1]", anatomy(model))
    weight = model.transformer.h[1].attn.c_attn.weight
    thirds = weight.T.chunk(3)
    assert [site.part.take(weight, 1).T.equal(third) for site, third in zip(sites, thirds, strict=True)] == [True] * 3
    assert {(site.d_in, site.d_out, site.transposed, site.kind) for site in sites} == {(32, 32, True, "linear")}


def test_packed_pieces_have_the_width_of_their_heads() -> None:
    heads = Heads(query=4, key=2, width=8)
    parts = [Packed("x", "q k v", piece).part(64, heads) for piece in ("q", "k", "v")]
    assert parts == [Part(1, 0, 32), Part(1, 32, 48), Part(1, 48, 64)]
    assert Packed("x", "gate up", "up").part(96, heads) == Part(1, 48, 96)


@pytest.mark.parametrize(
    ("build", "where", "count"),
    [
        (tiny.llama, "attn.{q,v}", 6),
        (tiny.llama, "attn.{q,v}[1:]", 4),
        (tiny.llama, "block[-1]:out", 1),
        (tiny.llama, "{attn,ffn}", 6),
        (tiny.gpt2, "attn.{q,k,v}", 6),
        (tiny.gpt_neox, "attn.{q,v}", 4),
        (tiny.t5, "attn.q", 4),
        (tiny.t5, "encoder.attn.q", 2),
        (tiny.t5, "decoder.{attn,cross}.{q,v}[0]", 4),
        (tiny.t5, "embed", 2),
        (tiny.bart, "cross.o", 2),
        (tiny.bert, "ffn.{up,down}", 4),
    ],
)
def test_wheres_select_as_many_sites_as_the_model_has(build: Any, where: str, count: int) -> None:
    model = build()
    assert len(select(model, where, anatomy(model))) == count


def test_grouped_query_widths_reach_the_sites() -> None:
    model = tiny.llama()
    q, k = select(model, "attn.{q,k}[0]", anatomy(model))
    assert (q.d_in, q.d_out, k.d_in, k.d_out) == (32, 32, 32, 16)
    assert q.heads == Heads(query=4, key=2, width=8)


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_a_role_that_the_family_lacks_is_an_error_that_lists_its_roles(name: str) -> None:
    model = tiny.FAMILIES[name]()
    with pytest.raises(DeltaTuneError, match=r"'ffn.gate' .*matches nothing .*attn\.q"):
        select(model, "ffn.gate", anatomy(model))


@family
def test_a_sublayer_that_is_no_module_is_a_span_from_its_first_linear_to_its_last(name: str) -> None:
    found = anatomy(tiny.FAMILIES[name]())
    ffn, up, down = (places(found, role) for role in ("ffn", "ffn.up", "ffn.down"))
    if name in NO_FFN_MODULE:
        assert [(p.path, p.exit) for p in ffn] == [(a.path, b.path) for a, b in zip(up, down, strict=True)]
    else:
        assert all(p.exit is None and d.path.startswith(f"{p.path}.") for p, d in zip(ffn, down, strict=True))
    for attention, last in zip(places(found, "attn"), places(found, "attn.o"), strict=True):
        assert (attention.exit or last.path) == last.path
        assert (attention.exit is None) == last.path.startswith(f"{attention.path}.")


def test_bert_as_a_decoder_is_causal_and_has_cross_attention() -> None:
    config = tiny.bert().config
    config.is_decoder = config.add_cross_attention = True
    found = anatomy(transformers.BertLMHeadModel(config))
    assert found.stacks[0].causal
    assert len(places(found, "cross.q")) == 2


def test_gpt2_cross_attention_is_packed_in_two() -> None:
    config = tiny.gpt2().config
    config.add_cross_attention = True
    model = transformers.GPT2LMHeadModel(config)
    k, v = select(model, "cross.{k,v}[0]", anatomy(model))
    assert (k.part, v.part) == (Part(1, 0, 32), Part(1, 32, 64))


def test_soft_prompts_go_behind_the_first_token_of_encoders_like_bert_only() -> None:
    behind = {name for name, build in tiny.FAMILIES.items() if anatomy(build()).stacks[0].prompt_at == 1}
    assert behind == {"bert", "roberta", "xlm_roberta", "electra", "distilbert"}
