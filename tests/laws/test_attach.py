"""Laws of attaching: nothing reaches the backbone, and everything is undone bit for bit, in any order."""

from __future__ import annotations

import itertools

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES, METHODS, busy, cases, delta_of, fresh, gradients, output


def portrait(model):
    """Everything that detach has to give back."""
    return (
        [(path, type(m), sorted(k for k in m.__dict__ if "deltatune" in k)) for path, m in model.named_modules()],
        [(n, p.requires_grad, id(p), p.detach().clone()) for n, p in model.named_parameters(remove_duplicate=False)],
        list(model.state_dict()),
        str(model),
        str(vars(model).get("config")),
        [m.config._attn_implementation for m in model.modules() if "config" in vars(m)],
    )


def same(one, two):
    """Compare two portraits bit for bit."""
    tensors = all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(one[1], two[1], strict=True))
    return tensors and one[0] == two[0] and one[2:] == two[2:]


@pytest.mark.parametrize(("method", "name"), cases())
def test_detach_gives_the_backbone_back_bit_for_bit(method, name):
    model = BACKBONES[name]()
    next(model.parameters()).requires_grad_(False)  # what was frozen before stays frozen after
    with torch.no_grad():
        before, scores = portrait(model), output(model)
        with dt.attach(model, busy(fresh(delta_of(method, name), model))) as attachment:
            assert not same(before, portrait(model))
            output(model)
        assert same(before, portrait(model))
        assert torch.equal(output(model), scores)
    assert not attachment.attached
    with pytest.raises(dt.DeltaTuneError, match="not attached"):
        attachment.detach()


@pytest.mark.parametrize(("method", "name"), cases())
def test_no_gradient_and_no_write_reaches_the_backbone(method, name):
    model = BACKBONES[name]().train()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    attachment = dt.attach(model, busy(fresh(delta_of(method, name), model)))
    optimizer = torch.optim.SGD(attachment.parameters(), lr=0.1)
    output(model).float().square().mean().backward()
    optimizer.step()
    assert all(g is None for g in gradients(model))
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attachment.parameters())
    assert any(p.grad.abs().sum() > 0 for p in attachment.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_three_deltas_come_off_in_any_order(name, order):
    model = BACKBONES[name]()
    before = portrait(model)
    deltas = [dt.LoRA(), dt.Adapter(size=4), dt.PrefixTuning(length=2)]
    together = [dt.attach(model, busy(dt.init(d, model), seed=i), name=f"d{i}") for i, d in enumerate(deltas)]
    for i in order[:2]:
        together[i].detach()
    left = output(model)
    model_alone = BACKBONES[name]()
    dt.attach(model_alone, busy(dt.init(deltas[order[2]], model_alone), seed=order[2]))
    torch.testing.assert_close(left, output(model_alone), rtol=0, atol=1e-6)
    together[order[2]].detach()
    assert same(before, portrait(model))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "plain"])
def test_a_sum_of_deltas_is_the_same_as_one_after_the_other(name):
    place = "path:blocks.*.{first,second}" if name == "plain" else "ffn.{up,down}"
    one, two = dt.LoRA(rank=3).at(place), dt.BitFit().at(place)
    model, other = BACKBONES[name](), BACKBONES[name]()
    weights = busy(dt.init(one + two, model))
    dt.attach(model, weights)
    halves = [{n[2:]: t for n, t in weights.tensors.items() if n.startswith(f"{i}.")} for i in (0, 1)]
    for delta, half in zip((one, two), halves, strict=True):
        dt.attach(other, dt.Weights(delta, {f"0.{n}": t for n, t in half.items()}, dt.fingerprint(other)))
    torch.testing.assert_close(output(model), output(other), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "name"), cases("llama", "t5"))
def test_optimizers_and_wrappers_see_exactly_the_leaves(method, name):
    model = BACKBONES[name]()
    attachment = dt.attach(model, fresh(method, model), name="mine")
    found = {id(p) for n, p in model.named_parameters() if p.requires_grad}
    assert found == {id(p) for p in model.deltas.mine.parameters()} == {id(p) for p in attachment.parameters()}
    assert all(n.startswith("deltas.mine.") for n, p in model.named_parameters() if p.requires_grad)


def test_the_printed_model_shows_the_delta_and_keeps_the_class_names():
    model = tiny.llama()
    with dt.attach(model, dt.LoRA(rank=3), name="mine"):
        assert "<mine: LoRA(rank=3)>" in str(model.model.layers[0].self_attn.q_proj)
        assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear"
    assert "LoRA" not in str(model)


def test_a_failed_attach_leaves_the_model_as_it_was():
    model = tiny.llama()
    before = portrait(model)
    weights = dt.init(dt.LoRA(), model)
    broken = dt.Weights(weights.delta, dict(list(weights.tensors.items())[1:]), weights.backbone)
    with pytest.raises(dt.DeltaTuneError, match="lack the tensor"):
        dt.attach(model, broken)
    assert same(before, portrait(model))


@torch.no_grad()
def test_tied_head_can_be_adapted_without_its_embedding():
    model = tiny.t5()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.shared.weight
    embedding = model.shared(torch.arange(5))
    with dt.attach(model, busy(dt.init(dt.LoRA().at("head"), model))):
        assert torch.equal(model.shared(torch.arange(5)), embedding)
    with pytest.raises(dt.DeltaTuneError, match="untie=True"):
        dt.merge(model, busy(dt.init(dt.LoRA().at("head"), model)))
    state = dt.merge(model, busy(dt.init(dt.LoRA().at("head"), model)), untie=True)
    assert list(state) == ["lm_head.weight"]


@torch.no_grad()
def test_full_fine_tuning_of_tied_parameters_is_one_leaf():
    model = tiny.llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    weights = dt.init(dt.Full(), model)
    assert weights.count == sum(p.numel() for p in model.parameters())
    moved = busy(weights)
    with dt.attach(model, moved):
        scores = output(model)
    with dt.merge_(model, moved):
        torch.testing.assert_close(output(model), scores, rtol=0, atol=1e-6)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_methods_are_found_by_being_defined():
    assert {"LoRA", "Adapter", "BitFit", "Full", "LastLayers", "PrefixTuning", "PromptTuning"} <= set(METHODS)
