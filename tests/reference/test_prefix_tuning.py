"""Prefix tuning against peft with the same tensors, and against softmax(q [K_P; K]^T) [V_P; V] written out for T5.

peft counts the text's positions from the prefix length; here they start at zero, so peft is given positions that are
smaller by that length.
"""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES, busy
from tests.reference.compare import TOLERANCE, batch_of, by_path, copied, moved, scores

P = 4
KINDS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}


def peft_prefix(model, name, **config):
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(model, PrefixTuningConfig(task_type=KINDS[name], num_virtual_tokens=P, **config)).eval()


def peft_scores(name, fill, **config):
    """Return the scores of peft's model at every position that is not padding, after `fill` filled its encoder."""
    host, given = BACKBONES[name](), batch_of(name)
    theirs = peft_prefix(host.bert if name == "bert" else host, name, **config)
    fill(theirs.prompt_encoder["default"])
    y = theirs(**given, position_ids=torch.arange(7)[None] - P)
    logits = host.cls(y.last_hidden_state) if name == "bert" else y.logits
    return logits[given["attention_mask"].bool()], theirs


def side_by_side(leaves, *names):
    """Return K and V of all layers side by side, as peft stores them: [length, layers 2 width]."""
    return torch.cat([layer[name] for layer in leaves for name in names], -1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_prefix_tuning_equals_peft_with_the_same_tensors(name):
    model, weights = moved(name, dt.PrefixTuning(length=P), size=0.5)
    leaves = list(by_path(model, weights).values())
    bare = scores(model)
    reference, theirs = peft_scores(name, lambda e: copied(e.embedding.weight, side_by_side(leaves, "K", "V")))
    attachment = dt.attach(model, weights)
    ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, **TOLERANCE)
    ours.square().mean().backward()
    reference.square().mean().backward()
    gradients = {n: p.grad for n, p in attachment.named_parameters()}
    own = side_by_side(
        [{leaf: gradients[f"0.{path}.{leaf}"] for leaf in "KV"} for path in by_path(model, weights)], "K", "V"
    )
    torch.testing.assert_close(own, theirs.prompt_encoder["default"].embedding.weight.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_without_other_positions_peft_needs_keys_turned_by_the_prefix_length():
    model, weights = moved("llama", dt.PrefixTuning(length=P), size=0.5)
    given, leaves = batch_of("llama"), list(by_path(model, weights).values())
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[P]]))
    turned = [{"K": turn(layer["K"], cos[0], sin[0]), "V": layer["V"]} for layer in leaves]
    theirs = peft_prefix(BACKBONES["llama"](), "llama")
    copied(theirs.prompt_encoder["default"].embedding.weight, side_by_side(turned, "K", "V"))
    with dt.attach(model, weights):
        torch.testing.assert_close(scores(model), theirs(**given).logits[given["attention_mask"].bool()], **TOLERANCE)


def turn(keys, cos, sin):
    """Return rotary keys [length, heads width] turned by one angle, in the halves layout of Llama."""
    heads = keys.unflatten(-1, (-1, cos.shape[-1]))
    one, two = heads.chunk(2, -1)
    return (heads * cos + torch.cat([-two, one], -1) * sin).flatten(1)


@torch.no_grad()
def test_prefixes_of_a_t5_decoder_equal_peft_where_nothing_depends_on_positions():
    # peft adds the relative position bias to the prefix, and hands both decoder blocks the first one's keys and values
    model, other = BACKBONES["t5"](), BACKBONES["t5"]()
    for each in (model, other):
        for stack in (each.encoder, each.decoder):
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    start = busy(dt.init(dt.PrefixTuning(length=P).at("decoder.attn"), model), size=0.5)
    first, _ = by_path(model, start).values()
    weights = dt.Weights(start.delta, {n: first[n[-1]] for n in start.tensors}, start.backbone)
    theirs = peft_prefix(other, "t5")
    copied(theirs.prompt_encoder["default"].embedding.weight, side_by_side([first, first], "K", "V"))
    bare = scores(model)
    with dt.attach(model, weights):
        assert (scores(model) - bare).abs().max() > 1e-2
        torch.testing.assert_close(scores(model), theirs(**batch_of("t5")).logits.flatten(0, 1), **TOLERANCE)


def write_out(model, leaves):
    """Make every attention of a T5 compute the paper's formula; nothing is added to the prefix's scores."""
    model.set_attn_implementation("eager")  # so that the mask is always an explicit sum

    def hook(prefix):
        def attend(module, args, kwargs, y):
            given = (
                dict(zip(("hidden_states", "mask", "key_value_states", "position_bias"), args, strict=False)) | kwargs
            )
            source = given.get("key_value_states")
            source = given["hidden_states"] if source is None else source
            q = split(module.q(given["hidden_states"]))
            k, v = split(module.k(source)), split(module.v(source))
            scores = q @ k.mT + y[1]  # the position bias
            scores = scores if given.get("mask") is None else scores + given["mask"]
            before = q @ split(prefix["K"][None]).mT
            share = torch.cat([before, scores], -1).softmax(-1)
            mixed = share[..., :P] @ split(prefix["V"][None]) + share[..., P:] @ v
            return module.o(mixed.transpose(1, 2).flatten(2)), *y[1:]

        return attend

    for path, prefix in leaves.items():
        model.get_submodule(path).register_forward_hook(hook(prefix), with_kwargs=True)


def split(x):
    return x.unflatten(-1, (tiny.HEADS, -1)).transpose(1, 2)


@torch.no_grad()
def test_prefix_tuning_of_t5_equals_the_formula_in_all_its_attentions():
    model, weights = moved("t5", dt.PrefixTuning(length=P), size=0.5)
    reference, leaves = BACKBONES["t5"](), by_path(model, weights)
    assert len(leaves) == 2 + 2 + 2
    write_out(reference, leaves)
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_prefix_through_a_network_equals_peft_and_the_formula(name):
    width = 16 if name == "llama" else tiny.WIDTH  # two key/value heads of 8
    through = dt.MLP(size=width, hidden=10)
    model, weights = moved(name, dt.Reparam(dt.PrefixTuning(length=P), through))
    leaves = list(by_path(model, weights).values())
    shared = leaves[0]
    assert sum(n.startswith("0.*.") for n in weights.tensors) == 3

    def fill(encoder):
        copied(encoder.embedding.weight, shared["E"])
        copied(encoder.transform[0].weight, shared["W"])
        copied(encoder.transform[0].bias, shared["b"])
        copied(encoder.transform[2].weight, torch.cat([layer[n] for layer in leaves for n in ("W_K", "W_V")]))
        copied(encoder.transform[2].bias, torch.cat([layer[n] for layer in leaves for n in ("b_K", "b_V")]))

    reference, theirs = peft_scores(name, fill, prefix_projection=True, encoder_hidden_size=10)
    assert sum(p.numel() for p in theirs.prompt_encoder.parameters()) == weights.count
    with dt.attach(model, weights):
        torch.testing.assert_close(scores(model), reference, **TOLERANCE)
    hidden = (shared["E"] @ shared["W"].T + shared["b"]).tanh()
    plain = dt.flatten(model, weights)
    for path, layer in by_path(model, weights).items():
        for n in "KV":
            formula = hidden @ layer[f"W_{n}"].T + layer[f"b_{n}"]
            torch.testing.assert_close(plain.tensors[f"0.{path}.{n}"], formula, rtol=0, atol=1e-6)
