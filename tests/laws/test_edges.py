"""Laws at the edges: low precision, ranks and widths that do not fit, one token, overflow, and what moves beside the gradient."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core.leaves import tensors_of
from deltatune.core.method import Bag, Method
from deltatune.core.motion import advance, drawn, penalty
from tests import tiny
from tests.laws.cases import BACKBONES, COMBINED, METHODS, busy, cases, fresh, output

PRIMES = (13, 29)
# Methods whose rank is the width of something that the weight does not bound, or is cut where it does not fit.
FREE = {"AdaMSS", "Compacter", "LoKr", "MultitaskPromptTuning", "PEANuT", "PVeRA", "RandLoRA", "VeRA"}
# What makes a method's penalty count where its default is none.
PENALISED = {"HRA": {"order": 0.1}}


@pytest.mark.parametrize(("method", "name"), cases("llama", "bert"))
def test_a_bfloat16_backbone_gives_finite_scores_and_gradients(method, name):
    model = BACKBONES[name]().bfloat16()
    attachment = dt.attach(model, busy(fresh(method, model)))
    scores = output(model)
    scores.float().square().mean().backward()
    assert scores.isfinite().all()
    assert all(p.grad.isfinite().all() for p in attachment.parameters())
    assert any(p.grad.abs().sum() > 0 for p in attachment.parameters())


RANKED = [label for label, m in METHODS.items() if "rank" in {f.name for f in fields(m)}]


def above(label: str, rank: int) -> tuple[nn.Module, dt.Delta]:
    """Return a tiny backbone and a method of this rank at one of its sites."""
    method = replace(METHODS[label], rank=rank)
    if "linear" in method.kinds:
        return tiny.plain(), method.at("path:blocks.*.first")
    return tiny.llama(), method.at(method.where)


@pytest.mark.parametrize("label", [label for label in RANKED if label not in FREE])
def test_a_rank_that_does_not_fit_is_refused_with_both_numbers(label):
    with pytest.raises(dt.DeltaTuneError, match=rf"{label}\(rank=1008\b") as error:
        dt.sites(*above(label, 1008))
    size = vars(METHODS[label]).get("size", tiny.FFN)
    assert any(str(width) in str(error.value) for width in (tiny.WIDTH, tiny.FFN, size))


@torch.no_grad()
@pytest.mark.parametrize("label", sorted(FREE))
def test_a_rank_that_no_width_bounds_works_above_them(label):
    model, delta = above(label, tiny.FFN + 1)
    with dt.attach(model, busy(fresh(delta, model))):
        assert output(model).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases("llama", "gpt2"))
def test_a_text_of_one_token_is_scored_as_it_is_in_front_of_others(method, name):
    model = BACKBONES[name]()
    ids = tiny.batch(model)["input_ids"]
    with dt.attach(model, busy(fresh(method, model))):
        alone, among = model(input_ids=ids[:, :1]).logits, model(input_ids=ids).logits
    assert alone.shape == (3, 1, tiny.VOCABULARY)
    torch.testing.assert_close(alone, among[:, :1], rtol=0, atol=1e-5)


def prime() -> nn.Module:
    """Return two linears of prime widths, in float64."""
    a, b = PRIMES
    return tiny.seeded(lambda: nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, a))).double()


def on_primes(method: Method, model: nn.Module, x: torch.Tensor) -> dt.Weights:
    """Return fresh weights at the first linear, with what evidence they need."""
    delta = method.at("path:0")
    rows = [{"input": row} for row in x] if dt.needs(model, delta) else []
    found = dt.evidence(model, delta, rows, loss=lambda y: y.square().mean()) if rows else {}
    return dt.init(delta, model, evidence=found)


@pytest.mark.parametrize("label", [n for n, m in METHODS.items() if m.acts == "linear"])
def test_prime_widths_work_or_are_named(label):
    method, model = METHODS[label], prime()
    x = torch.randn(4, 3, PRIMES[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    try:
        dt.sites(model, method.at("path:0"))
    except dt.DeltaTuneError as error:
        assert any(str(width) in str(error) for width in PRIMES)
        return
    weights = on_primes(method, model, x)
    with torch.no_grad():
        before = model(x)
        if "identity" not in method.breaks:
            with dt.attach(model, weights):
                torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
        with dt.attach(model, busy(weights)):
            attached = model(x)
        assert (attached - before).abs().max() > 1e-5
        if "merge" not in method.breaks:
            with dt.merge_(model, busy(weights)):
                torch.testing.assert_close(model(x), attached, rtol=0, atol=1e-9)
            assert torch.equal(model(x), before)


@torch.no_grad()
@pytest.mark.parametrize(
    "delta",
    [
        dt.IA3().at("path:blocks.*.first"),
        dt.BitFit().at("path:blocks.*.first"),
        dt.LNTuning().at("path:blocks.*.scale"),
        dt.Scale(dt.LoRA(rank=2), by=0.5).at("path:blocks.*.first"),
        dt.Reparam(dt.LoRA(rank=2), dt.Subspace(dim=20)).at("path:blocks.*.first"),
    ],
    ids=str,
)
def test_a_merge_that_overflows_float16_is_refused_and_changes_nothing(delta):
    model = tiny.plain().half()
    state = {n: p.clone() for n, p in model.state_dict().items()}
    weights = dt.init(delta, model)
    huge = replace(weights, tensors={n: torch.full_like(t, 1e6) for n, t in weights.tensors.items()})
    for merge in (dt.merge, dt.merge_):
        with pytest.raises(
            dt.DeltaTuneError, match=r"merged blocks\.0\..* overflows torch\.float16; nothing was changed"
        ):
            merge(model, huge)
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize(("method", "name"), cases("bert", "t5"))
def test_stored_tensors_come_back_bit_for_bit(method, name, tmp_path):
    model = BACKBONES[name]()
    weights = fresh(method, model)
    stored = {n for n, leaf in dt.sites(model, method).tensors.items() if leaf.kind == "stored"}
    assert set(weights.fixed) == stored
    dt.save(weights, tmp_path)
    again = dt.Weights.read(tmp_path)
    assert again.fixed.keys() == weights.fixed.keys()
    for n, tensor in weights.fixed.items():
        assert again.fixed[n].dtype == tensor.dtype
        assert torch.equal(again.fixed[n], tensor)
    with dt.attach(model, again) as attachment:
        assert all(torch.equal(t, weights.fixed[n]) for n, t in attachment.weights.fixed.items())


def moving(law: str) -> list[object]:
    """Return every method that has this law of motion, by itself and in a combinator, as pytest parameters."""
    own = [
        replace(m, **PENALISED.get(label, {}))
        for label, m in METHODS.items()
        if label not in COMBINED and getattr(type(m), law) is not getattr(Method, law)
    ]
    wrapped = [dt.Scale(m, by=0.5) for m in own if "linear" in m.kinds]
    return [pytest.param(m, id=str(m)) for m in own + wrapped]


def attached(method: Method) -> tuple[nn.Module, dt.Attachment]:
    """Return a tiny Llama with the method at its default place, moved away from its start."""
    model = tiny.llama()
    return model, dt.attach(model, busy(fresh(method, model)))


@pytest.mark.parametrize("method", moving("draw"))
def test_drawn_leaves_have_their_own_values_again_after_a_step_that_breaks(method):
    _, attachment = attached(method)
    leaves = {**dict(attachment.leaves.named_parameters()), **dict(attachment.leaves.named_buffers())}
    before = {n: t.detach().clone() for n, t in leaves.items()}
    with pytest.raises(ZeroDivisionError), drawn(attachment, seed=1):
        moved = {n for n, t in leaves.items() if not torch.equal(t, before[n])}
        raise ZeroDivisionError
    assert moved
    assert not any(leaves[n].requires_grad for n in moved)
    assert all(torch.equal(t, before[n]) for n, t in leaves.items())


@pytest.mark.parametrize("method", moving("penalty"))
def test_a_penalty_is_finite_and_has_a_gradient(method):
    _, attachment = attached(method)
    value = penalty(attachment)
    assert value is not None
    value.backward()
    gradients = [p.grad for p in attachment.parameters() if p.grad is not None]
    assert value.shape == () and value.isfinite() and value > 0
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("method", moving("step"))
def test_a_step_gives_leaves_values_of_their_own_shape(method):
    model, attachment = attached(method)
    for step in range(1, 4):
        output(model).float().square().mean().backward()
        live = [tensors_of(p, attachment.leaves).live() for p in attachment.placements]
        with torch.no_grad():
            changes = method.step([Bag(leaves) for leaves in live], step, 3)
        assert len(changes) == len(live)
        for leaves, change in zip(live, changes, strict=True):
            assert change
            assert all(v.shape == leaves[n].shape and v.isfinite().all() for n, v in change.items())
        advance(attachment, step, 3)
