"""Sequential stages: train, freeze, train the next, and one artifact that holds the whole composition."""

from __future__ import annotations

import itertools

import pytest
import torch

import deltatune as dt
from deltatune.core.delta import as_delta
from tests import tiny
from tests.laws.cases import BACKBONES, busy, fresh, output

LORA, VERA = dt.LoRA(rank=4), dt.VeRA(rank=6)
PAIRS = [
    (LORA, dt.Adapter(size=8)),
    (dt.LoRA(rank=2), LORA),
    (VERA, VERA),
    (dt.PrefixTuning(length=5), dt.PromptTuning(length=3)),
    (dt.PromptTuning(length=3), LORA),
    (dt.BitFit(), dt.Full().at("norm")),
    (dt.LadderSideTuning(), LORA),
    (dt.DoRA(rank=2), dt.IA3()),
    (dt.LoRA(rank=2, init=dt.PiSSA()), VERA + dt.BitFit()),
]
BOTH = [pair for a, b in PAIRS for pair in dict.fromkeys([(a, b), (b, a)])]


def stages(model, first, second):
    """Weights of both, away from their starts and of different seeds."""
    return busy(fresh(first, model, 1), 1), busy(fresh(second, model, 2), 2)


def attached(model, *weights):
    attachments = [dt.attach(model, w) for w in weights]
    try:
        with torch.no_grad():
            return output(model)
    finally:
        for attachment in attachments:
            attachment.detach()


@pytest.mark.parametrize(("first", "second"), BOTH, ids=str)
def test_the_joined_artifact_does_what_its_stages_do_in_order(first, second, tmp_path):
    model = tiny.llama()
    bare = attached(model)
    a, b = stages(model, first, second)
    wanted = attached(model, a, b)
    assert all((wanted - attached(model, *some)).abs().max() > 1e-4 for some in ((), (a,), (b,)))
    joined = dt.join(model, a, b)
    assert joined.delta == as_delta(first) + second
    assert joined.count == a.count + b.count
    dt.save(joined, tmp_path)
    again = dt.load(tiny.llama(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(output(again.model), wanted, rtol=0, atol=0)
    dt.save(again, tmp_path / "again")
    assert (tmp_path / "again/delta.safetensors").read_bytes() == (tmp_path / "delta.safetensors").read_bytes()
    torch.testing.assert_close(attached(model), bare, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_any_order_on_any_family(name):
    kinds = [LORA, dt.Adapter(size=8), dt.PrefixTuning(length=5)]
    model, parts = BACKBONES[name](), []
    for seed, kind in enumerate(kinds):
        parts.append(busy(fresh(kind, model, seed), seed))
    for order in itertools.permutations(parts):
        torch.testing.assert_close(attached(model, dt.join(model, *order)), attached(model, *order), rtol=0, atol=0)


def test_joining_is_associative_and_one_stage_is_itself():
    model = tiny.llama()
    a, b = stages(model, VERA, VERA)
    c = busy(fresh(VERA, model, 3), 3)
    left, right, flat = (
        dt.join(model, dt.join(model, a, b), c), dt.join(model, a, dt.join(model, b, c)), dt.join(model, a, b, c),
    )  # fmt: skip
    for one in (left, right):
        assert one.spec() == flat.spec()
        assert all(torch.equal(one.held[name], t) for name, t in flat.held.items())
    alone = dt.join(model, a)
    assert alone.spec() == a.spec() and not alone.fixed, "what the seed gives again is not stored"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_frozen_stage_acts_and_is_not_trained(name):
    model = BACKBONES[name]()
    first = dt.attach(model, busy(fresh(LORA, model)))
    before, alone = first.weights, output(model).detach()
    first.freeze()
    second = dt.attach(model, dt.Adapter(size=8))
    torch.testing.assert_close(output(model), alone, rtol=1e-5, atol=1e-6)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(n.startswith(f"deltas.{second.name}.") for n in trained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # also of what is frozen: it has no gradient
    for _ in range(3):
        output(model).square().mean().backward()
        assert all(p.grad is None for p in first.parameters())
        optimizer.step()
        optimizer.zero_grad()
    now = first.weights
    assert all(torch.equal(now.tensors[n], t) for n, t in before.tensors.items())
    trained = output(model).detach()
    assert (trained - alone).abs().max() > 1e-3
    whole = dt.join(model, first, second)
    second.detach()
    first.detach()
    torch.testing.assert_close(attached(model, whole), trained, rtol=1e-6, atol=1e-6)


def test_stages_of_another_backbone_and_tensors_that_do_not_fit_are_refused():
    model = tiny.llama()
    a, b = stages(model, LORA, dt.BitFit())
    with pytest.raises(dt.DeltaTuneError, match="made for another backbone: GPT2LMHeadModel"):
        dt.join(model, a, dt.init(LORA, tiny.gpt2()))
    other = dt.init(LORA, tiny.llama(seed=9))
    with pytest.raises(dt.DeltaTuneError, match="with other values"):
        dt.join(model, a, other)
    assert dt.join(model, a, other, check=False).count == 2 * a.count
    with pytest.raises(dt.DeltaTuneError, match="nothing to join"):
        dt.join(model)
    assert b.delta == dt.join(model, b).delta


def test_setting_numbers_of_another_seed_sets_what_the_seed_gives_too():
    model = tiny.llama()
    a, b = stages(model, VERA, VERA)
    wanted = attached(model, b)
    with dt.attach(model, a) as attachment, torch.no_grad():
        attachment.set(b)
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=0)
        assert attachment.weights.spec() == b.spec()


def test_what_travels_with_a_stage_goes_through_flattening_and_arithmetic():
    model = tiny.llama()
    kinds = dt.Reparam(dt.PrefixTuning(length=3)), VERA, VERA
    joined = dt.join(model, *(busy(fresh(kind, model, seed), seed) for seed, kind in enumerate(kinds)))
    flat = dt.flatten(model, joined)
    assert flat.delta != joined.delta and flat.fixed.keys() == joined.fixed.keys() != set()
    torch.testing.assert_close(attached(model, flat), attached(model, joined), rtol=1e-5, atol=1e-6)
    veras = dt.join(model, *stages(model, VERA, VERA))
    once, _ = dt.combine(model, [veras, veras], [0.5, 0.5])
    torch.testing.assert_close(attached(model, once), attached(model, veras), rtol=1e-5, atol=1e-6)
