"""Gated feed-forward layers with one product against those that transformers composes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import deltatune as dt
from deltatune.backbones.gated import Gated, gated
from tests import tiny
from tests.laws.cases import busy, fresh, output

EVERY = "{attn.{q,k,v,o},ffn.{gate,up,down}}"


class Layer(nn.Module):
    """Three linear layers and an activation, put together in some way."""

    def __init__(self, way: Callable[..., Tensor], act: nn.Module | None = None) -> None:
        super().__init__()
        self.c, self.a, self.b = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(12, 8)
        self.act, self.way = act or nn.SiLU(), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def usual(m: Any, x: Tensor) -> Tensor:
    return m.b(m.c(x) * m.act(m.a(x)))


def both(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A layer of transformers, and its lean form with the same weights."""
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, mlp_bias=True)
    plain = LlamaMLP(config).to(dtype)
    lean = gated(plain)
    assert isinstance(lean, Gated)
    return plain, lean


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_computes_the_same_bit_for_bit_and_so_do_its_gradients(dtype: torch.dtype) -> None:
    plain, lean = both(dtype)
    x, slope = torch.randn(3, 5, 16, dtype=dtype, requires_grad=True), torch.randn(3, 5, 16, dtype=dtype)
    wanted = [x, *plain.parameters()]
    found, expected = lean(x), plain(x)
    assert torch.equal(found, expected)
    pairs = (torch.autograd.grad(y, wanted, slope) for y in (found, expected))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*pairs, strict=True))
    with torch.no_grad():
        assert torch.equal(lean(x), expected)


def test_the_children_are_the_same_under_the_same_names() -> None:
    plain, lean = both()
    assert list(lean.state_dict()) == list(plain.state_dict())
    assert all(one is other for one, other in zip(plain.children(), lean.children(), strict=True))
    assert lean.gate_proj is plain.gate_proj and lean.intermediate_size == 24


def test_derivatives_are_right_to_the_second_order() -> None:
    _, lean = both(torch.float64)
    x = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lean, (x,))
    assert torch.autograd.gradgradcheck(lean, (x,))


def kept(model: nn.Module) -> int:
    """The bytes beside parameters that autograd keeps."""
    x, found = torch.randn(7, 16, requires_grad=True), {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = model(x * 1)
    assert held.requires_grad
    return sum(size for place, size in found.items() if place not in known)


def test_two_tensors_are_kept_where_three_were() -> None:
    plain, lean = both()
    assert kept(lean) == 2 * 7 * 24 * 4 and kept(plain) == 3 * 7 * 24 * 4


def test_what_somebody_else_does_to_the_activation_counts() -> None:
    plain, lean = both()
    x = torch.randn(2, 16, requires_grad=True)
    plain.act_fn.register_forward_hook(lambda module, args, y: 2 * y)
    assert torch.equal(lean(x), plain(x))
    lean.act_fn = nn.Tanh()
    assert torch.equal(lean(x), lean.down_proj(torch.tanh(lean.gate_proj(x)) * lean.up_proj(x)))


def test_unlike_types_are_multiplied_as_they_are() -> None:
    plain: Any
    plain, lean = both()
    plain.up_proj.register_forward_hook(lambda module, args, u: u.double())
    plain.down_proj.double()
    x = torch.randn(2, 16, requires_grad=True)
    assert torch.equal(lean(x), plain(x)) and lean(x).dtype == torch.float64


def test_it_is_copied_and_pickled() -> None:
    _, lean = both()
    x = torch.randn(2, 16, requires_grad=True)
    for other in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert isinstance(other, Gated) and other.gate_proj is not lean.gate_proj
        assert torch.equal(other(x), lean(x))


def test_who_is_who_shows_on_numbers() -> None:
    lean: Any = gated(Layer(usual))
    assert lean._names == ("a", "c", "b", "act")


@pytest.mark.parametrize(
    "layer",
    [
        Layer(lambda m, x: m.b(m.c(x) + m.act(m.a(x)))),
        Layer(lambda m, x: m.b(m.act(m.c(x) * m.a(x)))),
        Layer(lambda m, x: m.b(m.c(x) * m.act(m.a(x))) + x),
        Layer(lambda m, x: m.b(m.c(x).detach() * m.act(m.a(x)))),
        Layer(lambda m, x: m.b(m.c(x) * m.act(m.a(x), 1))),
        Layer(usual, nn.GELU()),
        Layer(usual, nn.PReLU()),
    ],
)
def test_what_computes_something_else_is_left_alone(layer: nn.Module) -> None:
    assert gated(layer) is None


def test_what_is_watched_is_left_alone() -> None:
    hooked, other = Layer(usual), Layer(usual)
    hooked.register_forward_hook(lambda *_: None)
    other.forward = lambda x: x
    assert gated(hooked) is None and gated(other) is None


def test_a_compiler_torch_func_and_forward_mode_take_the_plain_path() -> None:
    plain, lean = both(torch.float64)
    x, v = torch.randn(2, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    for transform in (lambda f: torch.func.jvp(f, (x,), (v,)), lambda f: torch.func.vjp(f, x)[1](v)):
        torch.testing.assert_close(transform(lean), transform(plain), rtol=0, atol=1e-12)
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent for f in (lean, plain)]
    torch.testing.assert_close(*tangents, rtol=0, atol=1e-12)
    seen = torch.compile(lean, fullgraph=True, backend="eager")
    torch.testing.assert_close(seen(x), plain(x), rtol=0, atol=1e-12)


def test_under_checkpointing_gradients_are_the_same() -> None:
    plain, lean = both()
    x = torch.randn(2, 16, requires_grad=True)
    found: Any = checkpoint(lean, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], torch.autograd.grad(plain(x).sum(), x)[0])


def test_lora_at_every_linear_keeps_less_and_has_the_same_gradients() -> None:
    found = []
    for change in (lambda module: module, gated):
        model: Any = tiny.llama().train()
        for block in model.model.layers:
            block.mlp = change(block.mlp)
        attachment = dt.attach(model, busy(fresh(dt.LoRA(rank=2).at(EVERY), model)))
        model.double()
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = output(model).square().mean()
        grads = torch.autograd.grad(loss, list(attachment.parameters()))
        found.append((torch.cat([grad.flatten() for grad in grads]), sum(sizes.values())))
    assert isinstance(model.model.layers[0].mlp, Gated)
    (plain, much), (lean, less) = found
    torch.testing.assert_close(lean, plain, rtol=1e-10, atol=1e-12)
    assert less < much
