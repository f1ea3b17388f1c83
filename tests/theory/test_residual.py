"""What families leave of a planted change: the tails, the masses outside and the projections, written out densely."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deltatune as dt
from deltatune.core.delta import place
from deltatune.theory.residual import best_mask, once, residuals
from tests import tiny
from tests.theory.planted import changed, low_rank, matrix, numbers

VALUES = [3.0, 2.0, 1.0, 0.5]


@pytest.fixture(scope="module")
def plain():
    return tiny.plain()


def moved(model, where):
    return changed(model, where, lambda name, t: 0.05 * numbers(*t.shape, seed=len(name)))


def test_the_residual_of_a_rank_is_the_tail_of_the_singular_values():
    model = tiny.gpt2()  # packed and transposed: the sites are slices of one stored weight
    tuned = changed(model, "path:transformer.h.0.mlp.c_fc", matrix(lambda t: low_rank(*t.shape, VALUES)))
    found = residuals(model, tuned, [dt.LoRA(rank=r).at("ffn.up") for r in (1, 2, 4)])
    assert [r.norm for r in found] == pytest.approx([np.hypot(2, np.hypot(1, 0.5)), np.hypot(1, 0.5), 0.0], abs=1e-4)
    assert found[0].total == pytest.approx(np.linalg.norm(VALUES), rel=1e-4)
    assert "rank=2" in found[1].finding and f"{found[1].parameters:,} parameters" in found[1].finding


def test_each_slice_of_a_packed_weight_has_its_own_rank():
    model = tiny.gpt2()
    width = tiny.WIDTH
    packed = torch.cat([low_rank(width, width, VALUES, i) for i in range(3)], 1)
    tuned = changed(model, "path:transformer.h.0.attn.c_attn", matrix(lambda t: packed))
    one, three = residuals(model, tuned, [dt.LoRA(rank=4).at("attn.q"), dt.LoRA(rank=4).at("attn.{q,k,v}")])
    assert one.norm == pytest.approx(np.sqrt(2) * np.linalg.norm(VALUES), rel=1e-4)
    assert three.norm == pytest.approx(0.0, abs=1e-4)


def test_bitfit_leaves_the_mass_outside_biases(plain):
    tuned = moved(plain, "path:blocks.**")
    found = residuals(plain, tuned, [dt.BitFit().at("path:blocks.*.*")])[0]
    exact = once(plain, dt.changes(plain, tuned))
    outside = [c for n, c in exact.items() if not n.endswith("bias")]
    assert found.norm == pytest.approx(np.sqrt(sum(float(c.square().sum()) for c in outside)), rel=1e-9)


def test_a_mask_leaves_the_mass_outside_it(plain):
    tuned = moved(plain, "path:blocks.**")
    family = dt.FixedMask(share=0.1).at("path:blocks.**")
    found = residuals(plain, tuned, [family], seed=3)[0]
    exact, weights = dt.changes(plain, tuned), dt.init(family, plain, seed=3)
    for p in place(plain, weights.delta):
        exact[f"{p.site.path}.{p.site.tensor}"].view(-1)[weights.fixed[p.name("index")].long()] = 0
    assert found.norm == pytest.approx(np.sqrt(sum(float(c.square().sum()) for c in exact.values())), rel=1e-9)
    assert residuals(plain, tuned, [weights])[0].norm == pytest.approx(found.norm), "or the weights say which mask"
    assert best_mask(once(plain, dt.changes(plain, tuned)), 0.1).norm < found.norm


def test_the_best_mask_keeps_the_largest_entries():
    change = {"a": torch.tensor([3.0, -4.0, 1.0]), "b": torch.tensor([[2.0]])}
    assert best_mask(change, 0.5).norm == pytest.approx(5**0.5)
    assert best_mask(change, 1.0).norm == 0.0


def test_did_leaves_the_mass_outside_its_fastfood_subspace(plain):
    tuned = moved(plain, "path:blocks.0.first")
    family = dt.DID(dim=6).at("path:blocks.0.first")
    found = residuals(plain, tuned, [family], seed=1)[0]
    exact, weights = dt.changes(plain, tuned), dt.init(family, plain, seed=1)
    columns = []
    for unit in torch.eye(6):
        at = dt.changes(plain, dt.Weights(weights.delta, {"0.*.z": 10 * unit}, weights.backbone, 1))
        columns.append(np.concatenate([at[n].numpy().ravel() for n in exact]))
    P, b = np.stack(columns, 1), np.concatenate([c.numpy().ravel() for c in exact.values()])
    left = b - P @ np.linalg.lstsq(P, b, rcond=None)[0]
    assert found.norm == pytest.approx(np.linalg.norm(left), rel=1e-6)
    assert found.share == pytest.approx(np.linalg.norm(left) / np.linalg.norm(b), rel=1e-6)


def test_a_family_reaches_its_own_change(plain):
    for family in (
        dt.FixedMask(share=0.05).at("path:blocks.**"),
        dt.DID(dim=30),
        dt.FourierFT(entries=20).at("path:scores"),
    ):
        weights = dt.init(family, plain)
        own = dt.Weights(
            weights.delta,
            {n: numbers(*t.shape).float() for n, t in weights.tensors.items()},
            weights.backbone,
            fixed=weights.fixed,
        )
        assert residuals(plain, own, [family])[0].share < 1e-6


def test_terms_that_share_no_parameter_add_up(plain):
    tuned = moved(plain, "path:blocks.**")
    where = "path:blocks.*.first"
    low, bias = dt.LoRA(rank=3).at(where), dt.BitFit().at(where)
    one, two, both = residuals(plain, tuned, [low, bias, low + bias])
    kept = [r.total**2 - r.norm**2 for r in (one, two, both)]
    assert kept[2] == pytest.approx(kept[0] + kept[1], rel=1e-9) and min(kept) > 0


def test_a_tied_parameter_counts_once():
    model = tiny.qwen2()
    tuned = changed(model, "path:model.embed_tokens", lambda name, t: 0.1 * torch.ones(t.shape))
    found = residuals(model, tuned, [dt.BitFit()])[0]
    assert found.total == pytest.approx(0.1 * (tiny.VOCABULARY * tiny.WIDTH) ** 0.5, rel=1e-4)


def test_families_that_it_does_not_fit_are_refused_with_one_that_does(plain):
    tuned = moved(plain, "path:blocks.**")
    with pytest.raises(dt.DeltaTuneError, match=r"not linear in its leaves.*BitFit"):
        residuals(plain, tuned, [dt.DoRA(rank=2).at("path:blocks.*.first")])
    with pytest.raises(dt.DeltaTuneError, match=r"changes no weight.*compare_answers"):
        residuals(plain, tuned, [dt.Adapter(size=4).at("path:blocks.*.second")])
    with pytest.raises(dt.DeltaTuneError, match="one family at a time"):
        residuals(plain, tuned, [dt.DID(dim=3) + dt.FixedMask().at("path:blocks.*")])
    with pytest.raises(dt.DeltaTuneError, match="one family at a time"):
        both = dt.BitFit().at("path:blocks.*.first") + dt.FixedMask(share=0.5).at("path:blocks.*.first")
        residuals(plain, tuned, [both])
    with pytest.raises(dt.DeltaTuneError, match="train it first"):
        residuals(plain, dt.init(dt.Full(), plain), [dt.DID(dim=3)])
    with pytest.raises(dt.DeltaTuneError, match="the share"):
        best_mask({"a": torch.ones(3)}, 2.0)
