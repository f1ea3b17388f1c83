"""Loops of feedback and the reach of controls, on methods and systems whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import deltatune as dt
from deltatune.theory.controllability import controllability
from deltatune.theory.dynamics import System
from deltatune.theory.feedback import loops
from tests import tiny
from tests.laws.cases import BACKBONES, delta_of, fresh
from tests.theory.stepped import STEPPED

KNOWN = {
    "BitFit": "open",
    "PrefixTuning": "open",
    "PromptTuning": "open",
    "LoRA": "linear",
    "IA3": "linear",
    "Full": "linear",
    "VeRA": "linear",
    "Adapter": "nonlinear",
    "ParallelAdapter": "nonlinear",
    "AdapterBias": "linear",
}


@pytest.mark.parametrize(("method", "name"), STEPPED)
def test_the_loop_of_every_method_is_found_by_trying(method, name):
    model = BACKBONES[name]()
    with dt.attach(model, fresh(delta_of(method, name), model)) as attachment:
        before = attachment.weights
        found = loops(attachment)
        assert set(found.values()) <= {"open", "linear", "nonlinear"}
        assert all(torch.equal(tensor, before.tensors[n]) for n, tensor in attachment.weights.tensors.items())
        if type(method).__name__ in KNOWN:
            assert set(found.values()) == {KNOWN[type(method).__name__]}


def test_the_gramian_of_a_linear_system_is_found():
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(4, n, generator=g, dtype=torch.float64) for n in (4, 2))
    zeros = [torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    system = System(
        torch.ones(4, dtype=torch.float64),
        zeros,
        lambda i, x, u: A @ x + B @ u,
        lambda x, u: 0 * u.sum(),
        lambda x: x.sum(),
    )
    found = controllability(system, probes=4)
    dear = replace(system, cost=lambda x, u: (x @ x + u.sum()) / 2)
    assert controllability(dear, probes=4) == found, "what controls cost is no part of what they reach"
    for index, reach in enumerate(found.steps):
        J = torch.linalg.matrix_power(A, 2 - index) @ B
        wanted = torch.linalg.eigvalsh(J @ J.mT).clamp(min=0).flip(0)
        torch.testing.assert_close(torch.tensor(reach.spectrum, dtype=torch.float64), wanted, rtol=1e-8, atol=1e-8)
        assert reach.trace == pytest.approx(float(wanted.sum()), rel=1e-8)
        assert reach.parameters == 2
    assert "moved most" in found.finding
    with pytest.raises(dt.DeltaTuneError, match="5 probes of a state of 4 numbers"):
        controllability(system, probes=5)


def test_a_delta_that_trains_nothing_is_refused():
    from deltatune.theory.backbone import BackboneDynamics

    model = tiny.llama()
    attachment = dt.attach(model, dt.LoRA(rank=2))
    attachment.freeze()
    with pytest.raises(dt.DeltaTuneError, match="nothing that is trained"):
        controllability(BackboneDynamics(attachment, lambda: model(**tiny.batch(model)).logits.sum()))
