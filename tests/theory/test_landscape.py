"""Lines and planes through a delta's leaves, the path of training, and the overlap of subspaces."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

import deltatune as dt
from deltatune.theory.landscape import as_values, filter_normalised, interpolate, plane
from deltatune.theory.overlap import gradient_overlap, principal_angles, subspace_overlap
from deltatune.theory.path import trajectory
from tests import tiny
from tests.theory.planted import batches, busy, numbers


def loss_of(model, weights, data):
    with torch.no_grad(), dt.attach(model, weights):
        return sum(float(model(**batch).loss) for batch in data) / len(data)


def test_a_line_goes_through_both_weights_and_their_mean():
    model = tiny.llama()
    data, a, b = batches(model), *(busy(dt.LoRA(rank=2), model, seed=s) for s in (0, 1))
    found = interpolate(model, a, b, data, points=3)
    middle = dt.Weights(a.delta, {n: (t + b.tensors[n]) / 2 for n, t in a.tensors.items()}, a.backbone)
    assert found.losses == pytest.approx([loss_of(model, w, data) for w in (a, middle, b)])
    flat = interpolate(model, a, a, data, points=3)
    assert flat.barrier == 0.0 and len(set(flat.losses)) == 1
    assert "barrier" in found.finding and not dt.attachments(model)


def test_a_barrier_is_the_rise_above_the_straight_line():
    from deltatune.theory.landscape import Interpolation

    assert Interpolation((0.0, 0.5, 1.0), (1.0, 5.0, 3.0)).barrier == 3.0
    assert Interpolation((0.0, 0.5, 1.0), (1.0, 0.0, 3.0)).barrier == 0.0


def test_weights_without_a_line_between_them_are_refused():
    model = tiny.llama()
    a = dt.init(dt.LoRA(rank=2), model)
    with pytest.raises(dt.DeltaTuneError, match="to_full"):
        interpolate(model, a, dt.init(dt.LoRA(rank=3), model), batches(model))
    with pytest.raises(dt.DeltaTuneError, match="other fixed tensors"):
        interpolate(model, *(dt.init(dt.VeRA(rank=4), model, seed=s) for s in (0, 1)), batches(model))
    with pytest.raises(dt.DeltaTuneError, match="at least 2"):
        interpolate(model, a, a, batches(model), points=1)


def test_unlike_deltas_have_a_line_between_what_they_make_of_the_weights():
    model = tiny.llama()
    data, a, b = batches(model), busy(dt.LoRA(rank=2).at("attn.q"), model), busy(dt.BitFit().at("norm"), model)
    for first, second in ((a, b), (None, b)):
        ends = as_values(model, first, second)
        assert ends[0].delta == ends[1].delta
        found = interpolate(model, *ends, data, points=2).losses
        bare = sum(float(model(**batch).loss.detach()) for batch in data) / len(data)
        assert found == pytest.approx([loss_of(model, a, data) if first else bare, loss_of(model, b, data)], rel=1e-5)
    with pytest.raises(dt.DeltaTuneError, match="deltatune theory gap"):
        as_values(model, a, busy(dt.PromptTuning(length=2), model))


def test_rows_of_a_direction_get_the_norms_of_the_leafs():
    d, like = numbers(4, 3, 2), numbers(4, 3, 2, seed=1)
    like[2] = 0
    found = filter_normalised(d, like)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), like.flatten(1).norm(dim=1))
    torch.testing.assert_close(found[0] / found[0].norm(), d[0] / d[0].norm())
    assert not filter_normalised(torch.zeros(3), numbers(3)).any()


def test_a_plane_has_the_weights_in_its_centre_and_gives_them_back():
    model = tiny.llama()
    data, weights = batches(model, 1), busy(dt.LoRA(rank=2), model)
    with dt.attach(model, weights) as attached:
        found = plane(attached, data, radius=0.5, points=3)
        assert all(torch.equal(t, weights.tensors[n]) for n, t in attached.weights.tensors.items())
        assert found.losses[1][1] == pytest.approx(found.centre) == pytest.approx(loss_of_live(model, data))
        assert found == plane(attached, data, radius=0.5, points=3), "the directions come from the seed"
        one = {n: torch.ones_like(p) for n, p in attached.named_parameters()}
        zero = {n: torch.zeros_like(p) for n, p in attached.named_parameters()}
        steps = plane(attached, data, radius=0.1, points=3, directions=(one, zero))
    assert len(set(steps.losses[0])) == 1
    moved = dt.Weights(weights.delta, {n: t + 0.1 for n, t in weights.tensors.items()}, weights.backbone)
    assert steps.losses[2][0] == pytest.approx(loss_of(model, moved, data))
    with dt.attach(model, weights) as attached, pytest.raises(dt.DeltaTuneError, match="no plane"):
        plane(attached, data, radius=0.0)


def loss_of_live(model, data):
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in data) / len(data)


def test_a_path_has_the_principal_components_of_its_points():
    model = tiny.plain()
    saved = [busy(dt.LoRA(rank=2).at("path:scores"), model, size=0.1 * (i + 1), seed=i) for i in range(5)]
    found = trajectory(saved)
    M = np.stack([np.concatenate([t.numpy().ravel() for _, t in sorted(w.tensors.items())]) for w in saved])
    U, S, _ = np.linalg.svd((M - M.mean(0)).astype(float), full_matrices=False)
    np.testing.assert_allclose(found.shares, (S**2 / (S**2).sum())[:2], rtol=1e-6)
    np.testing.assert_allclose(np.abs(found.coordinates), np.abs(U * S)[:, :2], atol=1e-6)
    with pytest.raises(dt.DeltaTuneError, match="3 or more weights of one delta"):
        trajectory(saved[:2])


def test_principal_angles_are_those_of_scipy():
    model = tiny.bert()
    a, b = (busy(dt.LoRA(rank=r), model, seed=r) for r in (2, 3))
    found = principal_angles(a, b)
    exact = [dt.changes(model, w) for w in (a, b)]
    for address, angles in found.outputs.items():
        A, B = (c[f"{address}.weight"].numpy() for c in exact)
        spans = [np.linalg.svd(W)[0][:, :r] for W, r in ((A, 2), (B, 3))]
        np.testing.assert_allclose(angles, np.sort(scipy.linalg.subspace_angles(*spans)), atol=1e-6)
        U, V = map(torch.from_numpy, spans)
        assert found.overlaps()[address][0] == pytest.approx(subspace_overlap(U, V))
    assert "overlap by" in found.finding
    same = principal_angles(a, a)
    assert all(o == pytest.approx(1.0) for pair in same.overlaps().values() for o in pair)


def test_deltas_without_spans_are_refused():
    model = tiny.llama()
    a, b = (busy(dt.Adapter(size=2), model, seed=s) for s in (0, 1))
    with pytest.raises(dt.DeltaTuneError, match="compare_answers"):
        principal_angles(a, b, model)


def test_gradients_overlap_with_themselves_and_within_bounds():
    model = tiny.llama()
    data = batches(model, 4)
    with dt.attach(model, busy(dt.LoRA(rank=2), model)) as attached:
        same = gradient_overlap(attached, data[:2], data[:2])
        other = gradient_overlap(attached, data[:2], data[2:])
        mixed = gradient_overlap(attached, data[:1], data[:2])
        size = sum(p.numel() for p in attached.parameters())
        with pytest.raises(dt.DeltaTuneError, match="no batches"):
            gradient_overlap(attached, [], data)
    assert same.overlap == pytest.approx(1.0) and same.ranks == (2, 2) and same.size == size
    assert 0 <= other.overlap < 1 and mixed.overlap == pytest.approx(1.0), "one span holds the other"
    assert other.random == pytest.approx(2 / size) and "random ones" in other.finding
