"""An attached backbone as a dynamical system: its co-states, and that its Hamiltonians have the slopes of the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import deltatune as dt
from deltatune.theory.backbone import BackboneDynamics
from deltatune.theory.control import control_report
from deltatune.theory.dynamics import WeightDecay
from deltatune.theory.msa import MSA
from tests import tiny
from tests.laws.cases import BACKBONES, busy, delta_of, fresh, output
from tests.theory.stepped import STEPPED


def exact(model: Any) -> None:
    """Let the norms that compute in single precision whatever comes keep to that of their input."""
    for module in model.modules():
        if "variance_epsilon" in vars(module):
            module.forward = lambda h, m=module: m.weight * h * (h.square().mean(-1, True) + m.variance_epsilon).rsqrt()


def dynamics(model: Any, delta: Any, cost: Any = None) -> BackboneDynamics:
    """Attach weights that are away from their start, in double precision, under a loss that looks at every output."""
    attachment = dt.attach(model, busy(fresh(delta, model)))
    exact(model.double())

    def loss() -> Tensor:
        return output(model).square().mean()

    return BackboneDynamics(attachment, loss) if cost is None else BackboneDynamics(attachment, loss, cost)


def test_a_model_whose_blocks_are_not_known_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="blocks of this model are not known"):
        dynamics(tiny.plain(), dt.LoRA(rank=2).at("path:**.first"))


@pytest.mark.parametrize(("method", "name"), STEPPED)
def test_the_hamiltonians_have_the_slope_of_the_loss(method, name):
    system = dynamics(BACKBONES[name](), delta_of(method, name))
    leaves = system.controls
    if not leaves:
        assert system.sweep().slope() == {}
        return
    expected = torch.autograd.grad(system.call(), list(leaves.values()), allow_unused=True)
    found = system.sweep().slope()
    for (leaf, _), gradient in zip(leaves.items(), expected, strict=True):
        own = found.get(leaf)
        assert (own is None) == (gradient is None), leaf
        if own is not None:
            torch.testing.assert_close(
                own, -gradient, rtol=1e-8, atol=1e-10, msg=lambda text, leaf=leaf: f"{leaf}: {text}"
            )


DELTAS = [dt.LoRA(rank=2), dt.Adapter(size=4), dt.PrefixTuning(length=3), dt.BitFit().at("{attn.q,ffn.down}")]


@pytest.mark.parametrize("delta", DELTAS, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_one_ascent_of_msa_is_back_propagation_and_gradient_descent(delta, decay, family):
    cost = WeightDecay(decay)
    system = dynamics(BACKBONES[family](), delta, cost)
    leaves = system.controls
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    loss = system.call() + cost(leaves)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert MSA(0.5).update(system).loss == pytest.approx(float(loss.detach()), rel=1e-10)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        torch.testing.assert_close(leaf.detach(), before[name] - 0.5 * gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("msa", [MSA(0.05, ascents=3), MSA(0.05, ascents=2, rho=0.1)], ids=str)
@pytest.mark.parametrize("delta", DELTAS, ids=str)
def test_more_ascents_and_the_extended_method_lower_the_loss(delta, msa):
    model: Any = tiny.llama()
    model.config._attn_implementation = "eager"  # the fused attention has no second derivative
    system = dynamics(model, delta)
    losses = [msa.update(system).loss for _ in range(6)]
    assert losses[-1] < losses[0]


def test_the_last_costate_is_minus_the_slope_of_the_terminal_cost():
    model: Any = tiny.llama()
    system = dynamics(model, dt.LoRA(rank=2))
    sweep = system.sweep()
    h = sweep.steps[-1].after.detach().requires_grad_()
    terminal = model.lm_head(model.model.norm(h)).square().mean()
    rows = output(model)
    assert rows.shape[0] == h.shape[0]
    (slope,) = torch.autograd.grad(terminal, h)
    torch.testing.assert_close(sweep.costates[-1], -slope, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("delta", [*DELTAS, dt.IA3(), dt.LoReFT()], ids=str)
def test_a_report_tells_where_the_controls_act_and_leaves_them_as_they_are(delta):
    system = dynamics(tiny.llama(), delta)
    before = {name: leaf.detach().clone() for name, leaf in system.controls.items()}
    report = control_report(system)
    assert all(torch.equal(leaf, before[name]) for name, leaf in system.controls.items())
    assert report.loss == pytest.approx(float(system.call().detach()), rel=1e-10)
    blocks = [step for step in report.steps if step.violation is not None]
    assert len(blocks) == 3
    assert all(step.violation >= 0 for step in blocks if step.violation is not None)
    assert report.violation > 0
    assert all((step.energy or 0) > 0 for step in blocks if step.parameters)
    assert report.finding.startswith("Pontryagin")


def test_what_reaches_a_step_beside_its_state_is_held_while_its_own_controls_are_moved():
    system = dynamics(tiny.t5(), dt.Full())  # a norm behind the encoder and the relative positions act in many blocks
    report = control_report(system)
    assert report.violation > 0 and all((step.violation or 0) >= 0 for step in report.steps)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        losses = [MSA(0.01, ascents=2, rho=rho).update(system).loss for rho in (0.0, 0.1, 0.0, 0.1)]
    assert losses[-1] < losses[0]


def test_what_trained_leaves_pass_between_blocks_is_part_of_what_a_block_reads():
    """T5's position bias and its encoder's last norm are trained by Full and read by blocks that they do not belong to."""
    system = dynamics(tiny.t5(), dt.Full())
    before = {name: leaf.detach().clone() for name, leaf in system.controls.items()}
    report = control_report(system)
    assert all(torch.equal(leaf, before[name]) for name, leaf in system.controls.items())
    assert all((step.violation or 0) > 0 for step in report.steps if not step.name.endswith("embeddings"))


def test_near_a_minimum_less_can_be_gained():
    system = dynamics(tiny.llama(), dt.BitFit().at("ffn.down[-1]"))
    early = control_report(system).violation
    for _ in range(200):
        MSA(2.0).update(system)
    assert control_report(system).violation < 0.5 * early


def test_a_block_that_depends_on_chance_is_refused():
    model: Any = tiny.llama().train()
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.5
    with pytest.raises(dt.DeltaTuneError, match="switch dropout off"):
        control_report(dynamics(model, dt.LoRA(rank=2)))
