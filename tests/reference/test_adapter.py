"""Adapter against h + f(h D^T + d) U^T + u, put around whole sub-layers of a copy of the model by forward hooks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import deltatune as dt
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, by_path, moved, scores

# the modules whose output is the sub-layer's, before the residual: another way in than the projections that roles name
SUBLAYERS = {
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.mlp"),
}
PROJECTIONS = {"self_attn": "o_proj", "mlp": "down_proj", "attn": "c_proj"}
FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}


def bottleneck(leaves, f):
    """Return the paper's adapter as a function of the hidden state."""
    return lambda h: h + f(h @ leaves["D"].T + leaves["d"]) @ leaves["U"].T + leaves["u"]


def change_output(module, change):
    module.register_forward_hook(lambda m, args, y: (change(y[0]), *y[1:]) if isinstance(y, tuple) else change(y))


def check(name, model, weights, reference):
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("activation", list(FUNCTIONS))
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_follow_whole_sublayers(name, activation):
    model, weights = moved(name, dt.Adapter(size=5, activation=activation))
    reference, leaves = BACKBONES[name](), by_path(model, weights)
    for pattern in SUBLAYERS[name]:
        for layer in range(model.config.num_hidden_layers):
            path = pattern.format(layer)
            last = "c_proj" if name == "gpt2" else PROJECTIONS[path.rpartition(".")[2]]
            change_output(
                reference.get_submodule(path), bottleneck(leaves.pop(f"{path}.{last}"), FUNCTIONS[activation])
            )
    assert not leaves
    check(name, model, weights, reference)


@torch.no_grad()
def test_adapters_of_t5_are_two_in_an_encoder_block_and_three_in_a_decoder_block():
    model, weights = moved("t5", dt.houlsby(size=5))
    reference, leaves = BACKBONES["t5"](), by_path(model, weights)
    assert len(leaves) == 2 * 2 + 2 * 3
    for path, last in (("SelfAttention", "o"), ("EncDecAttention", "o"), ("DenseReluDense", "wo")):
        for name, module in reference.named_modules():
            if name.endswith(path):
                change_output(module, bottleneck(leaves.pop(f"{name}.{last}"), F.gelu))
    assert not leaves
    check("t5", model, weights, reference)


@torch.no_grad()
@pytest.mark.parametrize(
    ("delta", "halves"), [(dt.houlsby(size=5), ("attention.output", "output")), (dt.pfeiffer(size=5), ("output",))]
)
def test_adapters_of_bert_come_before_the_residual_and_the_norm(delta, halves):
    model, weights = moved("bert", delta)
    reference, leaves = BACKBONES["bert"](), by_path(model, weights)
    f = F.gelu if len(halves) == 2 else F.relu
    for layer in range(2):
        for half in halves:  # LN(X + ADT(H(X))), with the residual X as the second argument
            path = f"bert.encoder.layer.{layer}.{half}"
            change = bottleneck(leaves.pop(f"{path}.dense"), f)
            reference.get_submodule(path).register_forward_hook(
                lambda m, args, y, change=change: m.LayerNorm(args[1] + change(m.dense(args[0])))
            )
    assert not leaves
    check("bert", model, weights, reference)


@torch.no_grad()
def test_adapterdrop_leaves_the_first_blocks_alone():
    model, weights = moved("llama", dt.adapterdrop(size=5, first=2))
    assert {path.split(".")[2] for path in by_path(model, weights)} == {"2"}
    hidden = [model.model(input_ids=torch.arange(6)[None], output_hidden_states=True).hidden_states]
    with dt.attach(model, weights):
        hidden.append(model.model(input_ids=torch.arange(6)[None], output_hidden_states=True).hidden_states)
    same = [torch.equal(bare, adapted) for bare, adapted in zip(*hidden, strict=True)]
    assert same == [True, True, True, False]


@torch.no_grad()
def test_the_input_side_changes_what_the_module_reads():
    model, weights = moved("llama", dt.Adapter(size=5).at("ffn:in"))
    reference, leaves = BACKBONES["llama"](), by_path(model, weights)
    for path, own in leaves.items():
        change = bottleneck(own, F.gelu)
        module = reference.get_submodule(path.removesuffix(":in"))
        module.register_forward_pre_hook(lambda m, args, change=change: (change(args[0]), *args[1:]))
    check("llama", model, weights, reference)
