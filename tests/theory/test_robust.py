"""The closed loop at test time: planes that are planted, and what a scope of steering does and undoes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.tasks import Example
from deltatune.theory.attack import attacked, perturbed
from deltatune.theory.robust import Manifold, last_states, manifolds, steered
from tests import tiny
from tests.theory.planted import busy, numbers

TEXT = "question: Which mountains surround the northern harbour of Naples ?"


def texts(name: str, seed: int, rows: int = 6) -> dict[str, torch.Tensor]:
    """Prompts whose last position answers: of a causal model as they are, of T5 beside the decoder's first token."""
    ids = torch.randint(5, tiny.VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids} | ({"decoder_input_ids": torch.zeros(rows, 1, dtype=torch.long)} if name == "t5" else {})


def attached(name: str, method: Any) -> dt.Attachment:
    model = getattr(tiny, name)()
    return dt.attach(model, busy(method, model, 0.3))


def test_the_plane_of_planted_states_is_found_and_distances_from_it_are_known():
    Q, _ = torch.linalg.qr(numbers(5, 4))
    spread = numbers(40, 2, seed=1) @ Q[:, :2].mT + 2 * Q[:, 2]
    mean = spread.mean(0)
    plane = Manifold.of(mean, spread.mT @ spread / 40, 0.9999)
    assert plane.basis.shape == (5, 2)
    assert plane.variance == pytest.approx(float((spread - mean).square().sum(-1).mean()), rel=1e-9)
    torch.testing.assert_close(plane.apart(spread.float()), torch.zeros(40), atol=1e-5, rtol=0)
    away = plane.apart((spread + 3 * Q[:, 3]).float()) * plane.variance
    torch.testing.assert_close(away, torch.full((40,), 9.0), rtol=1e-4, atol=0)


def test_moments_do_not_depend_on_how_texts_are_batched():
    model, both = tiny.t5(), texts("t5", 0)
    parts = [{n: t[rows] for n, t in both.items()} for rows in (slice(0, 4), slice(4, 6))]
    one, two = manifolds(model, [both]), manifolds(model, parts)
    assert list(one) == ["decoder.block.0", "decoder.block.1"]
    for name, plane in one.items():
        assert plane.basis.shape == two[name].basis.shape
        torch.testing.assert_close(plane.mean, two[name].mean)
        torch.testing.assert_close(
            plane.basis @ plane.basis.mT, two[name].basis @ two[name].basis.mT, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("method", [dt.PrefixTuning(length=3), dt.LoRA(rank=2)], ids=str)
def test_steering_brings_states_nearer_and_is_undone(name, method):
    link = attached(name, method)
    known = manifolds(link.model, [texts(name, seed) for seed in (0, 1)], share=0.5)
    before = {n: t.clone() for n, t in link.weights.tensors.items()}
    strange = texts(name, 7)
    states = last_states(link.model, strange)
    with steered(link, strange, known, steps=5, rate=0.02) as costs:
        inside = {n: t.clone() for n, t in link.weights.tensors.items()}
        moved = last_states(link.model, strange)
        cost = sum(float(plane.apart(moved[n].detach()).mean()) for n, plane in known.items())
    assert len(costs) == 6 and min(costs) < costs[0] and cost == pytest.approx(min(costs), rel=1e-5)
    assert any(not torch.equal(inside[n], t) for n, t in before.items())
    assert all(torch.equal(link.weights.tensors[n], t) for n, t in before.items())
    assert all(torch.equal(last_states(link.model, strange)[n], h) for n, h in states.items())
    assert all(leaf.grad is None for leaf in link.parameters())


def test_what_is_added_depends_on_the_batch():
    link = attached("t5", dt.PrefixTuning(length=3))
    known = manifolds(link.model, [texts("t5", 0)], share=0.5)
    found = []
    for seed in (3, 4):
        with steered(link, texts("t5", seed), known, steps=2):
            found.append(torch.cat([t.flatten() for t in link.weights.tensors.values()]).clone())
    assert not torch.equal(*found)


def test_steps_that_are_too_long_leave_the_open_loop():
    link = attached("t5", dt.PrefixTuning(length=3))
    known = manifolds(link.model, [texts("t5", seed) for seed in (0, 1)])
    before = link.weights.tensors
    with steered(link, texts("t5", 0), known, steps=3, rate=1e4) as costs:
        assert min(costs) == costs[0]
        assert all(torch.equal(t, before[n]) for n, t in link.weights.tensors.items())


def test_no_step_is_the_open_loop():
    link = attached("llama", dt.PrefixTuning(length=3))
    known = manifolds(link.model, [texts("llama", 0)])
    plain = link.model(**texts("llama", 3)).logits
    with steered(link, texts("llama", 3), known, steps=0) as costs:
        assert torch.equal(link.model(**texts("llama", 3)).logits, plain) and len(costs) == 1


def test_what_cannot_be_steered_is_refused():
    link = attached("llama", dt.PrefixTuning(length=3))
    with pytest.raises(dt.DeltaTuneError, match="no batches"):
        manifolds(link.model, [])
    with pytest.raises(dt.DeltaTuneError, match="share=0"):
        manifolds(link.model, [texts("llama", 0)], share=0)
    with pytest.raises(dt.DeltaTuneError, match="spans no plane"):
        manifolds(link.model, [texts("llama", 0, rows=1)])
    known = manifolds(link.model, [texts("llama", 0)])
    link.freeze()
    with pytest.raises(dt.DeltaTuneError, match="trains nothing"), steered(link, texts("llama", 0), known):
        pass


def test_an_attack_mistypes_words_and_nothing_else():
    hit = perturbed(TEXT, 1.0)
    pairs = list(zip(TEXT.split(), hit.split(), strict=True))
    assert all(a[0] == b[0] and a[-1] == b[-1] and len(a) - len(b) in (0, 1) for a, b in pairs)
    assert [a for a, b in pairs if len(a) < 4 or not a.isalpha()] == [
        b for a, b in pairs if len(a) < 4 or not a.isalpha()
    ]
    assert sum(a != b for a, b in pairs) >= 5
    assert perturbed(TEXT, 1.0) == hit and perturbed(TEXT, 1.0, seed=1) != hit
    assert perturbed(TEXT, 0.0) == TEXT
    many = " ".join(["abcdefgh"] * 2000)
    assert sum(w != "abcdefgh" for w in perturbed(many, 0.3).split()) == pytest.approx(600, abs=80)
    example = Example("t/0", TEXT, "location", ("location",))
    (found,) = attacked([example], 1.0)
    assert found.input == hit and (found.target, found.references) == (example.target, example.references)
    with pytest.raises(dt.DeltaTuneError, match=r"rate=2.*0 to 1"):
        perturbed(TEXT, 2)
