"""The bound gap <= L |eps| on a quadratic, where all is known, and on real backbones."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.theory.bound import check_bound, check_segment
from deltatune.theory.residual import residuals
from tests import tiny
from tests.theory.planted import batches, changed, numbers


def quadratic(scale=1.0, points=11):
    """F(x) = x^T A x / 2 between two points; the gradient's norm is convex along the segment, so its ends hold L."""
    A = numbers(6, 6)
    A = scale * A @ A.mT
    a, b = numbers(6, seed=1), numbers(6, seed=2)

    def at(t):
        x = a + t * (b - a)
        return float(x @ A @ x / 2), float((A @ x).norm()), float((A @ x) @ (b - a))

    return A, a, b, check_segment(at, float((b - a).norm()), points)


@pytest.mark.parametrize("points", [2, 11])
def test_the_bound_holds_on_a_quadratic(points):
    A, a, b, found = quadratic(points=points)
    assert found.gap == pytest.approx(abs(float(a @ A @ a - b @ A @ b)) / 2)
    assert found.bound == pytest.approx(max(float((A @ x).norm()) for x in (a, b)) * float((b - a).norm()))
    assert found.holds and found.gap <= found.tight <= found.bound
    assert "gap <= L |eps| holds" in found.finding


def test_a_wrong_distance_is_seen_to_fail():
    found = check_segment(lambda t: (10.0 * t, 1.0, 10.0), 1.0)
    assert not found.holds and "fails" in found.finding
    with pytest.raises(dt.DeltaTuneError, match="at least 2"):
        check_segment(lambda t: (t, 1.0, 1.0), 1.0, points=1)


@pytest.mark.parametrize("name", ["bert", "qwen2"])
@pytest.mark.parametrize("family", [dt.LoRA(rank=2), dt.DID(dim=5), dt.BitFit()])
def test_the_bound_holds_between_a_tuned_backbone_and_the_nearest_point_of_a_family(name, family):
    model = tiny.FAMILIES[name]()
    tuned = changed(model, "path:**", lambda name, t: 0.03 * numbers(*t.shape, seed=len(name)))
    found = check_bound(model, tuned, family, batches(model, 1), points=5)
    assert found.holds and found.tight <= found.bound
    assert found.distance == pytest.approx(residuals(model, tuned, [family])[0].norm, rel=1e-4)
    with torch.no_grad(), dt.attach(model, tuned):
        assert found.losses[-1] == pytest.approx(float(model(**batches(model, 1)[0]).loss), rel=1e-5)
    h = 1 / 4
    slope = (found.losses[2] - found.losses[0]) / (2 * h)
    assert found.slopes[1] == pytest.approx(slope, rel=0.2, abs=0.05), "dF/dt is that of the losses"


def test_it_needs_batches_with_a_loss():
    model = tiny.plain()
    tuned = changed(model, "path:scores", lambda name, t: 0.1 * torch.ones(t.shape))
    with pytest.raises(dt.DeltaTuneError, match="no batches"):
        check_bound(model, tuned, dt.DID(dim=3), [])
    with pytest.raises(dt.DeltaTuneError, match="put labels into the batches"):
        check_bound(model, tuned, dt.DID(dim=3), [tiny.batch(model)])
