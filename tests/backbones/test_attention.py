"""Extra keys and values in a backbone's attention: implementations, masks, positions, and backbones without the interface."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core.site import RESOLVERS, Anatomy, Heads, Place, Stack
from tests import tiny
from tests.laws.cases import BACKBONES, busy, output

DELTAS = {
    "prefix": dt.PrefixTuning(length=3),
    "prompt": dt.PromptTuning(length=3),
    "both": dt.PrefixTuning(length=2) + dt.PromptTuning(length=3),
}


def implementations(model):
    return {module.config._attn_implementation for module in model.modules() if "config" in vars(module)}


def adapted(name, delta, implementation):
    model = BACKBONES[name]()
    model.set_attn_implementation(implementation)
    dt.attach(model, busy(dt.init(delta, model), size=0.5))
    return model


@torch.no_grad()
@pytest.mark.parametrize("label", DELTAS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_eager_attention_gives_what_sdpa_gives(name, label):
    scores = {kind: output(adapted(name, DELTAS[label], kind)) for kind in ("eager", "sdpa")}
    assert (scores["eager"] - output(BACKBONES[name]())).abs().max() > 1e-2
    mask = tiny.batch(BACKBONES[name]())["attention_mask"].bool()
    one, two = (s if name == "t5" else s[mask] for s in (scores["eager"], scores["sdpa"]))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@torch.no_grad()
def test_backbones_of_several_implementations_live_side_by_side():
    models = [adapted(name, DELTAS["prefix"], kind) for name in ("llama", "gpt2") for kind in ("eager", "sdpa")] + [
        adapted("llama", DELTAS["prompt"], "eager"),
        BACKBONES["llama"](),
    ]
    alone = [output(model) for model in models]
    again = [output(model) for model in reversed(models)]
    assert all(torch.equal(a, b) for a, b in zip(alone, reversed(again), strict=True))
    torch.testing.assert_close(alone[0], alone[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(alone[2], alone[3], rtol=0, atol=1e-4)
    assert implementations(models[-1]) == {"sdpa"}
    for model in models[:-1]:
        for attachment in dt.attachments(model).values():
            attachment.detach()
    assert [implementations(model) for model in models] == [
        {"eager"},
        {"sdpa"},
        {"eager"},
        {"sdpa"},
        {"eager"},
        {"sdpa"},
    ]


@pytest.mark.parametrize("kind", ["flex_attention", "flash_attention_2"])
def test_attention_that_cannot_take_extra_keys_is_refused_and_left_alone(kind):
    model = tiny.llama()
    model.config._attn_implementation = kind
    with pytest.raises(
        dt.DeltaTuneError,
        match=rf"cannot be added to '{kind}' attention; load the backbone with attn_implementation='sdpa'",
    ):
        dt.attach(model, DELTAS["prefix"])
    assert model.config._attn_implementation == kind
    assert "deltas" not in dict(model.named_children())


class OwnAttention(nn.Module):
    """Attention of its own, as an architecture outside transformers writes it."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(tiny.WIDTH, tiny.WIDTH)

    def forward(self, x):
        return x + nn.functional.scaled_dot_product_attention(self.q(x), x, x)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([OwnAttention()])

    def forward(self, x):
        return self.blocks[0](x)


@pytest.fixture
def own(monkeypatch):
    """A model whose attention is known by a resolver and does not use transformers' interface."""
    stack = Stack("", "blocks", 1, tiny.WIDTH, causal=False, heads=Heads(4, 4, 8))
    parts = Anatomy("own", (stack,), (Place("attn", "blocks.0", "", 0), Place("attn.q", "blocks.0.q", "", 0)))
    monkeypatch.setattr("deltatune.core.site.RESOLVERS", [lambda m: parts if isinstance(m, Own) else None, *RESOLVERS])
    return tiny.seeded(Own)


def test_a_backbone_without_the_interface_says_so_and_what_to_use_instead(own):
    with pytest.raises(
        dt.DeltaTuneError,
        match=r"OwnAttention does not look its attention function up .*AttentionInterface.*use a method on linears",
    ):
        dt.attach(own, DELTAS["prefix"])
    assert "deltas" not in dict(own.named_children())
    with dt.attach(own, dt.LoRA(rank=2).at("attn.q")):
        assert own(torch.zeros(1, 3, tiny.WIDTH)).shape == (1, 3, tiny.WIDTH)


def block_mask(visible, dtype):
    """Return a 4-D mask [batch, 1, queries, keys], either truth values or a sum for the scores."""
    if dtype == torch.bool:
        return visible[:, None]
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("label", DELTAS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_mask_of_the_users_own_is_kept_and_every_query_sees_the_extra_keys(name, label, dtype):
    model = adapted(name, DELTAS[label], "sdpa")
    ids = torch.randint(5, tiny.VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(3))
    segment = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])  # two texts packed in one row: neither sees the other
    visible = (segment[:, None] == segment) & torch.ones(8, 8, dtype=torch.bool).tril()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    packed = model(
        input_ids=ids, attention_mask=block_mask(visible.expand(2, -1, -1), dtype), position_ids=positions
    ).logits
    apart = torch.cat([model(input_ids=ids[:, :3]).logits, model(input_ids=ids[:, 3:]).logits], 1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("label", DELTAS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_of_each_row_are_those_that_the_caller_gives(name, label):
    model = adapted(name, DELTAS[label], "sdpa")
    ids = torch.randint(5, tiny.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(4))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [0, 2, 4, 6, 8]])
    together = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    for row in range(3):
        alone = model(input_ids=ids[row : row + 1], position_ids=positions[row : row + 1]).logits
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)
    first = model(input_ids=ids).logits
    torch.testing.assert_close(first[0], together[0], rtol=0, atol=1e-5)
    assert (first[1] - together[1]).abs().max() > 1e-3  # extra keys stand still while the text moves


@torch.no_grad()
@pytest.mark.parametrize("label", DELTAS)
def test_one_call_with_a_cache_continues_another(label):
    model = adapted("llama", DELTAS[label], "sdpa")
    ids = torch.randint(5, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
    whole = model(input_ids=ids).logits
    start = model(input_ids=ids[:, :4], use_cache=True)
    assert start.past_key_values.get_seq_length() == 4  # extra keys never enter the cache
    more = model(input_ids=ids[:, 4:8], past_key_values=start.past_key_values, use_cache=True)
    last = model(input_ids=ids[:, 8:], past_key_values=more.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([start.logits, more.logits, last.logits], 1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_attention_weights_are_given_for_the_extra_keys_too():
    model = adapted("llama", DELTAS["prefix"], "eager")
    weights = model(input_ids=torch.arange(6)[None], output_attentions=True).attentions
    assert [w.shape for w in weights] == [(1, tiny.HEADS, 6, 3 + 6)] * 3
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(1, tiny.HEADS, 6), rtol=0, atol=1e-5)
    assert (weights[0][..., :3] > 0).all()
    assert not weights[0][..., 3:].triu(1).any()
