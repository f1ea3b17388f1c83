"""Activations and norms of one operation against those that transformers composes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import NewGELUActivation
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import deltatune as dt
from deltatune.backbones.lean import Norm, make_lean
from tests import tiny
from tests.laws.cases import busy, fresh, output


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.other = NewGELUActivation(), nn.GELU()


def test_the_composed_gelu_becomes_one_kernel_that_computes_the_same() -> None:
    model = nn.Sequential(Layer(), nn.Sequential(Layer()))
    composed, other = model[0].act, model[0].other
    make_lean(model)
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert model[0].other is other
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    for act in (model[0].act, model[1][0].act):
        torch.testing.assert_close(act(x), composed(x), rtol=0, atol=1e-12)
        ours, theirs = (torch.autograd.grad(f(x).sum(), x)[0] for f in (act, composed))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def kept(act: nn.Module) -> int:
    """The number of tensors as large as the input that autograd keeps."""
    x, found = torch.randn(1000, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        act(x.clone())
    return len({t.data_ptr() for t in found if t.numel() == 1000})


def test_the_kernel_keeps_its_input_alone() -> None:
    layer = Layer()
    before = kept(layer.act)
    make_lean(layer)
    assert kept(layer.act) == 1 < before


def lean(norm: nn.Module) -> Any:
    """What takes the place of a norm."""
    model = nn.Sequential(norm)
    make_lean(model)
    return model[0]


def rough(kind: Any) -> Any:
    """A norm with weights that are not all one."""
    norm = kind(16, eps=1e-3)
    nn.init.uniform_(norm.weight, 0.5, 2)
    return norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm])
def test_the_composed_norm_becomes_one_operation_with_its_gradients(kind: Any) -> None:
    norm = rough(kind)
    own = lean(norm)
    assert isinstance(own, Norm)
    assert own.weight is norm.weight
    x = (torch.randn(3, 5, 16) * torch.tensor([1e-2, 1.0, 30.0])[:, None, None]).requires_grad_()
    slope = torch.randn_like(x)
    found, expected = own(x), norm(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    pairs = (torch.autograd.grad(y, (x, norm.weight), slope) for y in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(own(x), found, rtol=0, atol=0)


def test_derivatives_of_the_norm_are_right_to_the_second_order() -> None:
    own = lean(rough(LlamaRMSNorm)).double()
    x = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(own, (x,))
    assert torch.autograd.gradgradcheck(own, (x,))


def test_in_bfloat16_the_norm_rounds_no_more_than_the_composed_one() -> None:
    norm = rough(LlamaRMSNorm).bfloat16()
    own, x = lean(norm), torch.randn(64, 16).bfloat16().requires_grad_()
    slope = torch.randn(64, 16).bfloat16()
    exact = rough(LlamaRMSNorm).double()
    exact.weight.data.copy_(norm.weight.data)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(lean(exact)(wide), wide, slope.double())
    errors = [(torch.autograd.grad(one(x), x, slope)[0].double() - truth).norm() / truth.norm() for one in (own, norm)]
    assert errors[0] <= 1.1 * errors[1] < 0.02


def test_what_computes_something_else_is_left_alone() -> None:
    other = rough(GemmaRMSNorm)  # its weights count from 1
    assert lean(other) is other
    plain = nn.LayerNorm(16, bias=False)
    assert lean(plain) is plain


@pytest.mark.parametrize("delta", [dt.LoRA(rank=2).at("{attn.{q,k,v,o},ffn.{gate,up,down}}"), dt.LNTuning()], ids=str)
def test_a_lean_model_trains_as_it_did_and_keeps_its_parameters(delta: Any) -> None:
    found = []
    for change in (lambda model: None, make_lean):
        model: Any = tiny.llama()
        names = list(model.state_dict())
        change(model)
        assert list(model.state_dict()) == names
        attachment = dt.attach(model, busy(fresh(delta, model)))
        grads = torch.autograd.grad(output(model).square().mean(), list(attachment.parameters()))
        found.append(torch.cat([grad.flatten() for grad in grads]))
    assert isinstance(model.model.norm, Norm)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
