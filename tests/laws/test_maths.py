"""Laws of what a method computes: neutral start, merge, count, shapes, determinism."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import deltatune as dt
from deltatune.core.leaf import Given
from deltatune.core.method import Bag, registry
from deltatune.core.site import Site
from tests import tiny
from tests.laws.cases import BACKBONES, COMBINED, METHODS, busy, cases, delta_of, fresh, output


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases(keep=lambda m: "identity" not in m.breaks))
def test_a_fresh_delta_leaves_the_function_unchanged(method, name):
    model = BACKBONES[name]()
    before = output(model)
    with dt.attach(model, fresh(delta_of(method, name), model)):
        torch.testing.assert_close(output(model), before, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases())
def test_a_trained_delta_changes_the_function_and_keeps_every_shape(method, name):
    model = BACKBONES[name]()
    before = output(model)
    with dt.attach(model, busy(fresh(delta_of(method, name), model))):
        after = output(model)
    assert after.shape == before.shape
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-4


LINEAR = {label: m for label, m in METHODS.items() if m.acts == "linear" and "merge" not in m.breaks}


@pytest.mark.parametrize("label", LINEAR)
@pytest.mark.parametrize("bias", [True, False])
def test_the_cheap_road_equals_the_weight_that_defines_the_method(label, bias):
    method, (d_in, d_out) = LINEAR[label], (24, 40)
    site = Site(role="attn.q", path="", kind="linear", d_in=d_in, d_out=d_out, bias=bias)
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    b = torch.randn(d_out, generator=generator, dtype=torch.float64) if bias else None
    x = torch.randn(2, 5, d_in, generator=generator, dtype=torch.float64)
    evidence = {"fisher": {"weight": W**2}, "gradient": {"weight": W}, "inputs": {"": (x[0].mT @ x[0])}}
    given = Given(site, {"weight": W}, evidence)
    leaves = {n: leaf.init.fill(leaf.shape, generator, given) for n, leaf in method.leaves(site).items()}
    moved = {n: torch.randn(t.shape, generator=generator) for n, t in leaves.items() if method.leaves(site)[n].trained}
    p = method.unfold(Bag({n: t.double() if t.is_floating_point() else t for n, t in {**leaves, **moved}.items()}))
    acts: Any = method.computes
    cheap = acts.output(p, x, F.linear(x, W, b), SimpleNamespace(weight=W, bias=b, plain=None))
    torch.testing.assert_close(cheap, F.linear(x, acts.weight(p, W), acts.bias(p, b)), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases(keep=lambda m: "merge" not in m.breaks))
def test_the_merged_backbone_computes_what_the_attached_one_does(method, name):
    model = BACKBONES[name]().double()
    delta = delta_of(method, name)
    if isinstance(method, dt.BitFit) and name in ("llama", "t5"):
        delta = method.at(
            "{attn.{q,k,v,o},ffn.{up,down}}"
        )  # their norms cannot hold a bias, which merge says (test below)
    weights = busy(fresh(delta, model))
    before = output(model)
    with dt.attach(model, weights):
        attached = output(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with dt.merge_(model, weights):
        torch.testing.assert_close(output(model), attached, rtol=0, atol=1e-9)
    assert torch.equal(output(model), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("method", "name"), cases("t5", keep=lambda m: "merge" in m.breaks))
def test_what_cannot_be_merged_says_why(method, name):
    model = BACKBONES[name]()
    with pytest.raises(dt.DeltaTuneError, match="cannot be merged") as error:
        dt.merge(model, fresh(method, model))
    assert method.breaks["merge"] in str(error.value)


def test_a_bias_that_a_norm_cannot_hold_is_refused_by_merge():
    model = tiny.llama()
    with pytest.raises(dt.DeltaTuneError, match="LlamaRMSNorm cannot hold one"):
        dt.merge(model, dt.init(dt.BitFit(), model))


@pytest.mark.parametrize(("method", "name"), cases())
def test_declared_counted_trained_and_stored_parameters_are_the_same(method, name):
    model = BACKBONES[name]()
    delta = delta_of(method, name)
    table = dt.sites(model, delta)
    weights = fresh(delta, model)
    attachment = dt.attach(model, weights)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert table.parameters == weights.count == trained == sum(p.numel() for p in attachment.parameters())
    assert table.parameters == sum(row[4] for row in table.rows())
    assert f"{table.parameters:,}" in str(table)


@pytest.mark.parametrize(("method", "name"), cases())
def test_the_dry_run_needs_no_memory_and_touches_nothing(method, name):
    real = BACKBONES[name]()
    delta = delta_of(method, name)
    with torch.device("meta"):
        hollow = BACKBONES[name]() if name == "plain" else type(real)(real.config)
    assert dt.sites(hollow, delta).parameters == dt.sites(real, delta).parameters
    assert "deltas" not in dict(real.named_children())


@pytest.mark.parametrize(("method", "name"), cases())
def test_the_start_depends_on_seed_site_and_leaf_alone(method, name):
    delta = delta_of(method, name)
    model = BACKBONES[name]()
    alone = fresh(delta, model, seed=5)
    torch.manual_seed(99)
    torch.rand(7)
    place = "path:blocks.*.scale" if name == "plain" else "norm"
    beside = fresh(delta + dt.Full().at(place), BACKBONES[name](), seed=5)
    assert all(torch.equal(tensor, beside.tensors[n]) for n, tensor in alone.tensors.items())


@pytest.mark.parametrize("label", ["LoRA", "Adapter", "PrefixTuning", "PromptTuning", "Reparam(PrefixTuning)"])
def test_another_seed_gives_another_start(label):
    model = BACKBONES["llama"]()
    one, two = dt.init(METHODS[label], model, seed=0), dt.init(METHODS[label], model, seed=1)
    assert any(not torch.equal(tensor, two.tensors[name]) for name, tensor in one.tensors.items())


def test_every_combinator_is_checked():
    needy = {name for name, method in registry().items() if any(f.default is MISSING for f in fields(method))}  # type: ignore[arg-type]
    assert needy == {type(method).__name__ for method in COMBINED.values()}
