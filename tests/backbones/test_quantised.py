"""Deltas on quantised backbones: torchao int8 and int4, bitsandbytes 8 and 4 bits, all on the CPU."""

from __future__ import annotations

import copy
import functools
import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.backbones.quantised import RoundedLinear, quantise
from deltatune.core.stored import codes, quantised, values
from tests import tiny
from tests.laws.cases import busy, gradients, output

KINDS = {"int8": "torchao", "int4": "torchao", "8bit": "bitsandbytes", "4bit": "bitsandbytes"}
METHODS = {
    "LoRA": dt.LoRA(rank=4),
    "Adapter": dt.Adapter(size=8),
    "PrefixTuning": dt.PrefixTuning(length=5),
    "BitFit": dt.BitFit(),
    "DoRA": dt.DoRA(rank=4),  # it needs the norms of W
}


def llama() -> Any:
    """A Llama as wide as a block of 64 weights, which bitsandbytes needs; in training mode, where it packs nothing anew."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=tiny.VOCABULARY, pad_token_id=0, **sizes)
    return tiny.seeded(lambda: transformers.LlamaForCausalLM(config)).train()


def rounded(kind: str) -> Any:
    """The model with the linears of its blocks quantised."""
    pytest.importorskip(KINDS[kind])
    model = llama()
    if kind in ("int8", "int4"):
        quantise(model, kind)
        return model
    for path, linear in [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in p]:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, _in_bits(linear, kind))
    return model


def _in_bits(linear: nn.Linear, kind: str) -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    sizes = linear.in_features, linear.out_features, False
    layer = Linear8bitLt(*sizes, has_fp16_weights=False) if kind == "8bit" else Linear4bit(*sizes, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def twin(model: Any, kind: str) -> Any:
    """An ordinary model of the same values; 8 bits round what goes into a layer too, so there the layers compute themselves."""
    plain = llama()
    for path, module in plain.named_modules():
        theirs = model.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data.copy_(values(theirs._parameters[name], theirs))
        if kind == "8bit" and isinstance(module, nn.Linear) and "layers" in path:
            module.forward = copy.deepcopy(theirs).forward
    return plain


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("name", METHODS)
def test_a_delta_does_the_same_on_a_quantised_backbone(kind, name):
    model = rounded(kind)
    reference = twin(model, kind)
    weights = busy(dt.init(METHODS[name], model))
    bare = output(model)
    ordinary = dt.init(METHODS[name], reference)
    torch.testing.assert_close(dict(dt.init(METHODS[name], model).tensors), dict(ordinary.tensors))
    with dt.attach(model, weights), dt.attach(reference, replace(ordinary, tensors=weights.tensors)):
        torch.testing.assert_close(output(model), output(reference), rtol=1e-4, atol=1e-4)
        assert (output(model) - bare).abs().max() > 1e-2
    assert torch.equal(output(model), bare)


@pytest.mark.parametrize("name", METHODS)
def test_training_leaves_the_codes_alone(kind, name):
    model = rounded(kind)
    before = {n: codes(p).clone() for n, p in model.named_parameters()}
    print_before = dt.fingerprint(model)
    attachment = dt.attach(model, METHODS[name])
    optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        given = tiny.batch(model)
        losses.append(model(**given, labels=given["input_ids"]).loss)
        losses[-1].backward()
        assert all(g is None for g in gradients(model))
        assert all(p.grad is not None for p in attachment.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    attachment.detach()
    assert dt.fingerprint(model) == print_before
    assert all(torch.equal(codes(p), before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_merging_says_what_rounding_loses(kind):
    model = rounded(kind)
    weights = busy(dt.init(METHODS["LoRA"], model), size=0.2)
    with pytest.raises(
        dt.DeltaTuneError,
        match=r"off by 0\.\d+ of the exact change at 'model\.layers.*tolerance 0\.001.*is quantised.*Keep the delta attached",
    ):
        dt.merge(model, weights)
    exact = dt.merge(twin(model, kind), weights, check=False)
    bare, parameters = output(model), dict(model.named_parameters())
    with dt.attach(model, weights):
        wanted = output(model)
    with dt.merge_(model, weights, tolerance=1.0) as merged:
        assert merged.report.errors.keys() == exact.keys()
        for path, error in merged.report.errors.items():
            owner = model.get_submodule(path.removesuffix(".weight"))
            assert quantised(owner.weight)
            change = (exact[path] - values(parameters[path], owner)).norm()
            assert error == pytest.approx(float((values(owner.weight, owner) - exact[path]).norm() / change), rel=1e-3)
        assert 0 < merged.report.error < 1
        assert (output(model) - wanted).norm() < 2 * merged.report.error * (wanted - bare).norm()
    assert all(parameters[n] is p for n, p in model.named_parameters())
    assert torch.equal(output(model), bare)


def test_a_delta_that_changes_nothing_rounds_nothing_again(kind):
    model = rounded(kind)
    assert dt.merge(model, dt.init(dt.LoRA(rank=4), model)) == {}


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_merging_into_bitsandbytes_is_refused_but_for_biases(kind):
    model = rounded(kind)
    with pytest.raises(dt.DeltaTuneError, match=r"quantised as (Int8Params|Params4bit)\. Keep the delta attached"):
        dt.merge(model, busy(dt.init(dt.LoRA(rank=4), model)))
    biases = busy(dt.init(dt.BitFit().at("attn.{q,v}"), model))
    with dt.attach(model, biases):
        wanted = output(model)
    with dt.merge_(model, biases):
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["Full", "DiffPruning"])
def test_new_values_for_quantised_parameters_are_refused(kind, method):
    model = rounded(kind)
    with pytest.raises(dt.DeltaTuneError, match=r"q_proj\.weight, which is quantised .* such as LoRA\(\)"):
        dt.attach(model, dt.parse(f"{method}().at('attn.q')"))
    assert dt.attachments(model) == {} and "deltas" not in model._modules


def test_weights_travel_between_a_quantised_and_an_ordinary_backbone(kind, tmp_path):
    model = rounded(kind)
    dt.save(busy(dt.init(dt.LoRA(rank=4), model)), tmp_path)
    with pytest.raises(dt.DeltaTuneError, match="same shapes but with other values"):
        dt.load(llama(), tmp_path)
    with dt.load(llama(), tmp_path, check=False) as there, dt.load(model, tmp_path) as here:
        assert all(torch.equal(t, here.weights.tensors[n]) for n, t in there.weights.tensors.items())


def test_4_bits_are_kept_from_a_form_that_no_gradient_passes():
    model = rounded("4bit")
    layer: Any = model.model.layers[0].self_attn.q_proj
    layer.support_avx512bf16_for_cpu = True
    with dt.attach(model, dt.LoRA()):
        assert not layer.support_avx512bf16_for_cpu
        model.eval()(**tiny.batch(model))
        output(model.train()).sum().backward()
        assert all(p.grad is not None for p in model.deltas.parameters())
    assert layer.support_avx512bf16_for_cpu
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(dt.DeltaTuneError, match="packed its 4-bit weights.*attach before calling it"):
        dt.attach(model, dt.LoRA())


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_what_bitsandbytes_has_not_rounded_yet_is_refused(kind):
    nn_modules = pytest.importorskip("bitsandbytes.nn.modules")
    layer = nn_modules.Linear8bitLt(64, 64, has_fp16_weights=False) if kind == "8bit" else nn_modules.Linear4bit(64, 64)
    model = nn.Sequential(layer)
    with pytest.raises(dt.DeltaTuneError, match=r"was not yet: call model\.to\(device\)"):
        dt.attach(model, dt.LoRA().at("path:0"))
    assert dt.attach(model.to("cpu"), dt.LoRA().at("path:0")).attached


def test_the_built_in_backbone_loads_quantised():
    pytest.importorskip("torchao")
    backbone = dt.load_backbone("pebble", quantise="int8")
    kept = {n for n, p in backbone.model.named_parameters() if not quantised(p)}
    assert 0 < len(kept) < len(list(backbone.model.parameters()))
    assert not any(n.endswith("proj.weight") for n in kept)
    ids = torch.tensor([[5, 6, 7, 8]])
    exact = dt.load_backbone("pebble").model(input_ids=ids).logits
    off = (backbone.model(input_ids=ids).logits - exact).norm() / exact.norm()
    assert 0 < off < 0.05


def test_quantisation_that_cannot_be_is_refused(monkeypatch):
    with pytest.raises(dt.DeltaTuneError, match=r"no quantisation 'int9'.*int8, int4"):
        dt.load_backbone("pebble", quantise="int9")
    with pytest.raises(dt.DeltaTuneError, match=r"no nn\.Linear beside its head"):
        quantise(tiny.gpt2(), "int8")
    monkeypatch.setitem(importlib.import_module("sys").modules, "torchao.quantization", None)
    with pytest.raises(dt.DeltaTuneError, match=r'pip install "deltatune\[quantised\]"'):
        quantise(tiny.llama(), "int8")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_training_keeps_no_values_of_a_rounded_weight(kind):
    model = rounded(kind)
    batch, attachment = tiny.batch(model), dt.attach(model, dt.LoRA(rank=4).at("{attn.{q,k,v,o},ffn.{gate,up,down}}"))
    rectangles = {(64, 128), (128, 64)}  # the square weights look like the head's
    kept: list[tuple[int, ...]] = []

    def gradients_of(model: Any) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
            loss = model(**batch).logits.square().mean()
        loss.backward()
        return [p.grad for p in attachment.parameters() if p.grad is not None]

    ours = gradients_of(model)
    assert kept and not rectangles & set(kept)
    for module in [m for m in model.modules() if isinstance(m, RoundedLinear)]:
        module.forward = functools.partial(nn.Linear.forward, module)  # torchao's own way
    for own, plain in zip(ours, gradients_of(model), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-7)
    assert rectangles & set(kept)


def test_a_bias_beside_a_rounded_weight_is_trained():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 4), torch.randn(5, 8)
    exact = copy.deepcopy(linear)
    holder = nn.ModuleDict({"linear": linear, "head": nn.Linear(1, 1)})
    holder.get_output_embeddings = lambda: holder["head"]  # type: ignore[assignment]
    quantise(holder, "int8")
    for one in (linear, exact):
        one.weight.requires_grad_(False)
        one(x).square().sum().backward()
    torch.testing.assert_close(linear.bias.grad, exact.bias.grad, rtol=0.05, atol=0.05)
