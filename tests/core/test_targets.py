"""Places beyond linear layers: embeddings, convolutions, and weights that are read without a call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltatune as dt
from tests import tiny
from tests.core.targets import PLACES, VOCABULARY, WIDTH, Over, attention, convolution, embedding, example
from tests.laws.cases import METHODS, busy, gradients

LINEAR = {label: m for label, m in METHODS.items() if m.acts == "linear"}


def fresh_at(delta, model):
    """Return fresh weights with what evidence they need."""
    rows = [{"x": example(model)}]
    found = dt.evidence(model, delta, rows, loss=lambda y: y.square().mean()) if dt.needs(model, delta) else {}
    return dt.init(delta, model, evidence=found)


def acting(place):
    kind = "linear" if place == "out_proj" else place
    return [label for label, m in LINEAR.items() if kind in m.kinds and "merge" not in m.breaks]


CASES = [(place, label) for place in PLACES for label in acting(place)]


@pytest.mark.parametrize(("place", "label"), CASES)
def test_every_method_on_linears_is_neutral_acts_merges_and_learns_there(place, label):
    build, where = PLACES[place]
    model, method = build().double(), LINEAR[label]
    x, weights = example(model), fresh_at(method.at(where), model)
    moved = busy(weights)
    with torch.no_grad():
        bare = model(x)
        if "identity" not in method.breaks:
            with dt.attach(model, weights):
                torch.testing.assert_close(model(x), bare, rtol=0, atol=1e-6)
        with dt.attach(model, moved):
            attached = model(x)
        assert torch.equal(model(x), bare)
        assert (attached - bare).abs().max() > 1e-5
        if place == "embedding" and label in ("AdapterBias", "SSF"):  # an embedding has no place for their bias
            with pytest.raises(dt.DeltaTuneError, match="a bias, but Embedding cannot hold one. Keep it attached"):
                dt.merge(model, moved)
        else:
            with dt.merge_(model, moved):
                torch.testing.assert_close(model(x), attached, rtol=0, atol=1e-9)
            assert torch.equal(model(x), bare)
    attachment = dt.attach(model, moved)
    model(x).square().mean().backward()
    assert all(g is None for g in gradients(model))
    assert any(p.grad.abs().sum() > 0 for p in attachment.parameters())
    assert all(p.grad is not None for p in attachment.parameters())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("label", [label for label, m in LINEAR.items() if "merge" in m.breaks])
def test_a_method_without_a_weight_is_refused_there(place, label):
    build, where = PLACES[place]
    with pytest.raises(dt.DeltaTuneError, match=r"cannot act on 'only.*Put it at a linear layer") as error:
        dt.sites(build(), LINEAR[label].at(where))
    assert LINEAR[label].breaks["merge"] in str(error.value)


def test_methods_that_are_for_other_places_say_so():
    with pytest.raises(dt.DeltaTuneError, match="BitFit acts on a linear or norm, but 'path:only' found the embedding"):
        dt.sites(embedding(), dt.BitFit().at("path:only"))
    with pytest.raises(dt.DeltaTuneError, match="FRoD acts on a linear or conv, but 'path:only' found the embedding"):
        dt.sites(embedding(), dt.FRoD().at("path:only"))
    with pytest.raises(dt.DeltaTuneError, match="found the conv 'only'"):
        dt.sites(convolution(), dt.Adapter().at("path:only"))
    for build in (embedding, convolution):
        with pytest.raises(
            dt.DeltaTuneError, match="starts from a linear layer's inputs, and 'only' is no call of one"
        ):
            fresh_at(dt.LoRA(rank=2, init=dt.EVA()).at("path:only"), build())


def test_the_default_places_stay_as_they_were():
    model = tiny.llama()
    kinds = {p.site.kind for label in LINEAR for p in dt.sites(model, LINEAR[label]).placements}
    assert kinds <= {"linear", "norm"}


@torch.no_grad()
@pytest.mark.parametrize("label", ["LoRA", "DoRA", "OFT", "IA3"])
def test_an_embedding_is_the_linear_map_of_one_hot_tokens(label):
    model = embedding().double()
    W = model.only.weight.T.clone()
    line = Over(nn.Linear(VOCABULARY, WIDTH, bias=False)).double()
    line.only.weight.copy_(W)
    weights = busy(dt.init(LINEAR[label].at("path:only"), model))
    x = example(model)
    with dt.attach(model, weights), dt.attach(line, replace(weights, backbone=dt.fingerprint(line))):
        torch.testing.assert_close(model(x), line(F.one_hot(x, VOCABULARY).double()), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("label", ["LoRA", "DoRA", "OFT", "IA3", "SSF"])
def test_a_convolution_is_the_linear_map_of_patches(label):
    model = convolution().double()
    line = Over(nn.Linear(4 * 2, WIDTH)).double()
    line.only.weight.copy_(model.only.weight.flatten(1))
    line.only.bias.copy_(model.only.bias)
    weights = busy(dt.init(LINEAR[label].at("path:only"), model))
    x = example(model)
    patches = F.unfold(x, (1, 2), padding=1).mT  # [batch, positions, in * kernel]
    with dt.attach(model, weights), dt.attach(line, replace(weights, backbone=dt.fingerprint(line))):
        torch.testing.assert_close(model(x).flatten(2).mT, line(patches), rtol=0, atol=1e-10)


def check_peft(model, factors):
    """Assert that peft's LoRA, given our factors by `factors(its module)`, has our outputs, gradients and count."""
    from peft import LoraConfig, get_peft_model

    x = example(model)
    weights = busy(dt.init(dt.LoRA(rank=3, alpha=6.0).at("path:only"), model), size=0.3)
    reference = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["only"])).eval()
    theirs = reference.base_model.model.only
    pairs = {leaf: (weights.tensors[f"0.only.{leaf}"], p) for leaf, p in factors(theirs).items()}
    for ours, p in pairs.values():
        p.data.copy_(ours.reshape(p.shape))
    wanted = reference(x)
    wanted.square().mean().backward()
    plain = reference.unload()
    bare = plain(x)
    attachment = dt.attach(plain, weights, check=False)
    found = plain(x)
    found.square().mean().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - bare).abs().max() > 1e-2
    own = dict(attachment.named_parameters())
    for leaf, (_, p) in pairs.items():
        torch.testing.assert_close(own[f"0.only.{leaf}"].grad.reshape(p.shape), p.grad, rtol=1e-4, atol=1e-6)
    assert weights.count == sum(p.numel() for _, p in pairs.values())


def test_lora_on_an_embedding_is_that_of_peft():
    check_peft(embedding(), lambda m: {"A": m.lora_embedding_A["default"], "B": m.lora_embedding_B["default"]})


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_on_a_convolution_is_that_of_peft(dims, bias):
    model = convolution(dims, bias=bias, stride=2)
    check_peft(model, lambda m: {"A": m.lora_A["default"].weight, "B": m.lora_B["default"].weight})


def test_sizes_are_those_of_the_matrix():
    for model, d_in in [(embedding(), VOCABULARY), (convolution(), 8), (convolution(3), 4 * 6)]:
        table = dt.sites(model, dt.LoRA(rank=3).at("path:only"))
        assert table.parameters == 3 * (d_in + WIDTH)
        with pytest.raises(dt.DeltaTuneError, match=rf"LoRA\(rank=41\) exceeds .*: {WIDTH} x {d_in}; write a rank"):
            dt.sites(model, dt.LoRA(rank=41).at("path:only"))
    with pytest.raises(dt.DeltaTuneError, match=r"'only\.out_proj': 24 x 24"):
        dt.sites(attention(), dt.LoRA(rank=25).at("path:only.out_proj"))


@torch.no_grad()
def test_a_grouped_convolution_is_refused_by_name_and_tuned_whole():
    model = tiny.seeded(lambda: Over(nn.Conv1d(4, WIDTH, 3, groups=2)))
    with pytest.raises(
        dt.DeltaTuneError, match="acts on a linear or embedding or conv, but .* the grouped conv 'only'"
    ):
        dt.sites(model, dt.LoRA(rank=2).at("path:only"))
    weights = busy(dt.init(dt.Full().at("path:only"), model))
    with dt.attach(model, weights):
        found = model(example(model))
    torch.testing.assert_close(found, F.conv1d(example(model), *weights.tensors.values(), groups=2))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_takes_a_new_bias(bias):
    model = convolution(bias=bias)
    weights = busy(dt.init(dt.SSF().at("path:only"), model), size=0.5)
    scale, shift = (weights.tensors[f"0.only.{leaf}"][:, None, None] for leaf in "gs")
    x, bare = example(model), model(example(model))
    with dt.attach(model, weights):
        torch.testing.assert_close(model(x), bare * scale + shift)


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_two_deltas_act_in_order_with_the_whole_value_below(place):
    build, where = PLACES[place]
    model = build().double()
    delta = dt.Full().at(where) + dt.LoRA(rank=2).at(where) + dt.DoRA(rank=3).at(where)
    weights = busy(dt.init(delta, model))
    x = example(model)
    with dt.attach(model, weights):
        attached = model(x)
    with dt.merge_(model, weights):
        torch.testing.assert_close(model(x), attached, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_compiled_whole_it_is_the_same(place):
    build, where = PLACES[place]
    model = build()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x, bare = example(model), compiled(example(model))
    with dt.attach(model, busy(dt.init(dt.LoRA(rank=2).at(where), model))):
        torch.testing.assert_close(compiled(x), model(x))
        assert (compiled(x) - bare).abs().max() > 1e-5
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
def test_without_rows_shapes_are_kept_and_bfloat16_stays_bfloat16(place):
    build, where = PLACES[place]
    model = build().bfloat16()
    x = example(model)
    with dt.attach(model, busy(dt.init(dt.LoRA(rank=2).at(where), model))):
        if place != "out_proj":  # torch's own attention has no batch of no rows
            assert model(x[:0]).shape == (0, *model(x).shape[1:])
        assert model(x).dtype == torch.bfloat16
        assert model(x).isfinite().all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", [dt.LoRA(rank=2), dt.IA3(), dt.Full()], ids=str)
def test_a_merge_that_overflows_is_refused(place, method):
    build, where = PLACES[place]
    model = build().half()
    before = {n: p.clone() for n, p in model.named_parameters()}
    weights = dt.init(method.at(where), model)
    huge = replace(weights, tensors={n: torch.full_like(t, 1e6) for n, t in weights.tensors.items()})
    for merge in (dt.merge, dt.merge_):
        with pytest.raises(dt.DeltaTuneError, match=r"merged only\..* overflows torch\.float16; nothing was changed"):
            merge(model, huge)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_what_attention_reads_without_a_call_is_reached(training):
    model = attention().train(training)
    x, bare = example(model), model(example(model))
    for delta in (
        dt.LoRA(rank=2).at("path:only.out_proj"),
        dt.BitFit().at("path:only.out_proj"),
        dt.Full().at("path:only"),
    ):
        with dt.attach(model, busy(dt.init(delta, model))) as attachment:
            assert dt.trace(model, {"x": x}) == dt.Trace(("only",), ())
            attached = model(x)
        with dt.merge_(model, attachment.weights):
            torch.testing.assert_close(model(x), attached)
        assert (attached - bare).abs().max() > 1e-4
        assert torch.equal(model(x), bare)


@torch.no_grad()
def test_every_parameter_of_attention_counts_when_all_are_tuned():
    model = attention()
    x, bare = example(model), model(example(model))
    weights = dt.init(dt.Full().at("path:only"), model)
    assert len(weights.tensors) == 4
    for name in weights.tensors:
        one = {
            n: t + 0.5 * (n == name) * torch.randn(t.shape, generator=torch.Generator().manual_seed(1))
            for n, t in weights.tensors.items()
        }
        with dt.attach(model, replace(weights, tensors=one)):
            assert (model(x) - bare).abs().max() > 1e-4, name


def test_a_method_that_needs_a_call_is_refused_where_there_is_none():
    model = attention()
    for method in (dt.Adapter(size=4), dt.ParallelAdapter(size=4)):
        with pytest.raises(
            dt.DeltaTuneError, match=r"no effect at 'only\.out_proj': .* never calls it; write path:only"
        ):
            dt.attach(model, method.at("path:only.out_proj"))
    assert "deltas" not in dict(model.named_children())
    bare = model(example(model))
    with dt.attach(model, busy(dt.init(dt.Adapter(size=4).at("path:only"), model))):
        assert (model(example(model)) - bare).abs().max() > 1e-4


def test_what_is_there_travels_through_files(tmp_path):
    for place, (build, where) in PLACES.items():
        model = build()
        weights = busy(dt.init(dt.LoRA(rank=2).at(where), model))
        dt.save(weights, tmp_path / place)
        with torch.no_grad(), dt.attach(model, weights):
            before = model(example(model))
        with torch.no_grad(), dt.load(model, tmp_path / place):
            assert torch.equal(model(example(model)), before)
