"""Lanczos against dense eigenvalues: on matrices, and on the Hessian of a backbone's loss in a delta's leaves."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import deltatune as dt
from deltatune.theory import curvature
from deltatune.theory.curvature import Hessian, sharpness
from deltatune.theory.krylov import conjugate_gradients, lanczos
from tests import tiny
from tests.theory.planted import batches, busy, numbers


def symmetric(values):
    Q = torch.linalg.qr(numbers(len(values), len(values)))[0]
    return (Q * torch.tensor(values, dtype=torch.float64)) @ Q.mT


@pytest.mark.parametrize(
    "values", [[5.0, 3.0, 1.0, 0.5, -2.0, -4.0], [2.0] * 3 + [1.0] * 3, [0.0] * 6, [1.0] + [0.0] * 5]
)
def test_all_steps_give_all_eigenvalues_repeated_ones_too(values):
    A = symmetric(values)
    found = lanczos(lambda v: A @ v, 6, 6)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(A).flip(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(6).double(), rtol=0, atol=1e-9)


def test_few_steps_give_the_largest_ones_with_their_residuals():
    A = symmetric([100.0, 50.0, -80.0, *torch.linspace(-1, 1, 197).tolist()])
    found = lanczos(lambda v: A @ v, 200, 20)
    assert found.values[:2].tolist() == pytest.approx([100, 50]) and float(found.values[-1]) == pytest.approx(-80)
    exact = (A @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, exact, rtol=1e-4, atol=1e-9)


def test_long_runs_have_no_ghosts():
    A = symmetric([1e6, *torch.linspace(0, 1, 149).tolist()])
    found = lanczos(lambda v: A @ v, 150, 120)
    assert int((found.values > 1e5).sum()) == 1
    torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(120).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(20, 5), (5, 20)])
def test_the_normal_equations_give_what_the_dense_solver_does(shape):
    A, b = numbers(*shape), numbers(shape[0], seed=1)
    found = conjugate_gradients(lambda x: A.mT @ (A @ x), A.mT @ b)
    expected = torch.linalg.lstsq(A, b[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not conjugate_gradients(lambda x: x, torch.zeros(3)).any()
    with pytest.raises(dt.DeltaTuneError, match="use fewer"):
        conjugate_gradients(lambda x: A.mT @ (A @ x), A.mT @ b, steps=1)


def dense(model, attached, data):
    """The Hessian in full, by forward-over-reverse derivatives of a pure function of the leaves."""
    names = [n for n, p in model.named_parameters() if n.startswith("deltas.")]
    leaves = [model.get_parameter(n).detach() for n in names]

    def loss(flat):
        parts = flat.split([x.numel() for x in leaves])
        given = {n: p.view_as(x) for n, p, x in zip(names, parts, leaves, strict=True)}
        return sum(torch.func.functional_call(model, given, kwargs=batch).loss for batch in data) / len(data)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.hessian(loss)(torch.cat([x.flatten() for x in leaves])).double()


@pytest.mark.parametrize(
    "name, delta",
    [
        ("llama", dt.LoRA(rank=1).at("{attn.q,ffn.down}[0]")),
        ("bert", dt.LoRA(rank=1).at("attn.v[0]") + dt.BitFit().at("ffn.up[1]")),
        ("t5", dt.Adapter(size=2).at("decoder.ffn.down[-1]")),
        ("llama", dt.PrefixTuning(length=1).at("attn[-1]")),
    ],
)
def test_it_is_the_dense_hessian_on_a_small_model(name, delta):
    model = tiny.FAMILIES[name]()
    data = batches(model)
    with dt.attach(model, busy(delta, model, 0.3)) as attached:
        H = dense(model, attached, data)
        values, vectors = torch.linalg.eigh((H + H.mT) / 2)
        found = sharpness(attached, data, k=4, steps=60)
        v = numbers(H.shape[0])
        torch.testing.assert_close(Hessian(attached, data)(v), H @ v, rtol=1e-3, atol=1e-4)
        g = Hessian(attached, data).gradient()
    scale = float(values.abs().max())
    assert found.values == pytest.approx(values.flip(0)[:4].tolist(), rel=1e-3, abs=1e-4 * scale)
    assert found.least == pytest.approx(float(values[0]), rel=1e-2, abs=1e-3 * scale)
    assert found.gradient == pytest.approx(float(g.norm())) and found.size == H.shape[0]
    assert found.held == pytest.approx(float((vectors.flip(1)[:, :4].mT @ g).norm() / g.norm()) ** 2, abs=0.02)
    assert f"{found.size} parameters" in found.finding


def test_a_loss_that_is_linear_in_the_leaves_is_flat():
    model = tiny.plain()
    with dt.attach(model, dt.Full().at("path:scores")) as attached:
        found = sharpness(attached, [tiny.batch(model)], k=2, loss=lambda output: output.mean())
    assert found.values == (0.0, 0.0) and found.gradient > 0


def test_nothing_to_bend_is_refused():
    model = tiny.llama()
    with dt.attach(model, dt.LoRA(rank=1)) as attached:
        with pytest.raises(dt.DeltaTuneError, match="no batches"):
            sharpness(attached, [])
        with pytest.raises(dt.DeltaTuneError, match="cannot be found"):
            sharpness(attached, batches(model), k=5, steps=2)
        attached.freeze()
        with pytest.raises(dt.DeltaTuneError, match="do not freeze"):
            sharpness(attached, batches(model))
    with dt.attach(model, dt.Delta()) as attached, pytest.raises(dt.DeltaTuneError, match="LoRA"):
        sharpness(attached, batches(model))


def test_more_vectors_than_memory_should_hold_are_taken_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(curvature, "KEPT", 1000)
    model = tiny.llama()
    with dt.attach(model, dt.BitFit().at("ffn.down")) as attached:
        with pytest.raises(dt.DeltaTuneError, match=r"21 Lanczos vectors of 96 parameters.*write steps=.*LoRA"):
            sharpness(attached, batches(model), k=1)
        assert len(sharpness(attached, batches(model), k=1, steps=4).values) == 1
