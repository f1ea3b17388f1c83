"""Laws of the fused training paths: the numbers of the plain ones, with less kept for the backward pass."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import deltatune as dt
from deltatune.core.fused import Remake, Shared, remake
from tests import tiny
from tests.laws.cases import BACKBONES, busy, cases, delta_of, fresh, output

EVERY = "{attn.{q,k,v,o},ffn.{gate?,up,down}}"


def gradients(model: Any, attachment: dt.Attachment) -> list[Tensor]:
    """Return the gradients of all trained leaves."""
    return list(torch.autograd.grad(output(model).square().mean(), list(attachment.parameters())))


def plainly(model: Any, attachment: dt.Attachment) -> list[Tensor]:
    """Return the same on the plain paths, which forward-mode derivatives ask for."""
    with forward_ad.dual_level():
        return gradients(model, attachment)


def attached(model: Any, delta: Any) -> dt.Attachment:
    """Attach weights that are away from their start, all in double precision."""
    attachment = dt.attach(model, busy(fresh(delta, model)))
    model.double()
    return attachment


@pytest.mark.parametrize(("method", "name"), cases(keep=lambda m: m.acts == "linear"))
def test_fused_gradients_are_the_plain_ones(method, name):
    model = BACKBONES[name]()
    attachment = attached(model, delta_of(method, name))
    torch.testing.assert_close(gradients(model, attachment), plainly(model, attachment), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("delta", [dt.LoRA(rank=2).at(EVERY), dt.IA3().at("ffn.down:in")], ids=["LoRA", "IA3"])
def test_what_is_made_again_is_what_went_in_on_every_family(family, delta):
    model = tiny.FAMILIES[family]().train()
    attachment = attached(model, delta)
    torch.testing.assert_close(gradients(model, attachment), plainly(model, attachment), rtol=1e-9, atol=1e-12)


def kept(compute: Any, model: Any) -> int:
    """Return the bytes that autograd keeps for the backward pass of a loss, without parameters."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        store = tensor.untyped_storage()
        if store.data_ptr() not in known:
            found[store.data_ptr()] = store.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    loss.backward()
    return sum(found.values())


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "bert", "t5"])
def test_lora_on_every_linear_keeps_little_more_than_the_frozen_backbone(family):
    model: Any = tiny.FAMILIES[family]().train()
    table = model.get_input_embeddings()
    batch = tiny.batch(model)

    def compute() -> Tensor:
        given = {**batch, "inputs_embeds": table(batch["input_ids"]).detach().requires_grad_()}
        del given["input_ids"]
        return model(**given).logits.square().mean()

    model.requires_grad_(False)
    bare = kept(compute, model)
    with dt.attach(model, dt.LoRA(rank=1).at(EVERY)):
        fused = kept(compute, model)
        with forward_ad.dual_level():
            plain = kept(compute, model)
    assert fused < 1.12 * bare  # a rank of 1 beside a width of 32 is 1/32 of every output
    assert plain > 1.15 * bare or family in ("gpt2", "t5")


def test_second_derivatives_are_the_plain_ones():
    def curvature(model: Any, attachment: dt.Attachment) -> tuple[Tensor, ...]:
        leaves = list(attachment.parameters())
        first = torch.autograd.grad(output(model).square().mean(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    model: Any = tiny.gpt2()  # a family that computes its norms in the backbone's own precision
    model.config._attn_implementation = "eager"
    attachment = attached(model, dt.LoRA(rank=2).at("{attn.o,ffn.up}") + dt.IA3().at("ffn.down:in"))
    fused = curvature(model, attachment)
    with forward_ad.dual_level():
        plain = curvature(model, attachment)
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(reentrant):
    model: Any = tiny.llama().train()
    attachment = attached(model, dt.LoRA(rank=2).at(EVERY) + dt.IA3().at("ffn.down:in"))
    whole = gradients_after_backward(model, attachment)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients_after_backward(model, attachment), whole, rtol=1e-10, atol=1e-12)


def gradients_after_backward(model: Any, attachment: dt.Attachment) -> list[Tensor]:
    """Return the gradients that a backward pass leaves, and take them away."""
    output(model).square().mean().backward()
    found = [p.grad.clone() for p in attachment.parameters() if p.grad is not None]
    for p in attachment.parameters():
        p.grad = None
    assert found
    return found


def test_a_second_backward_through_a_kept_graph_gives_the_same_again():
    model = tiny.llama()
    attachment = attached(model, dt.LoRA(rank=2).at(EVERY))
    leaves, loss = list(attachment.parameters()), output(model).square().mean()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), once, rtol=0, atol=0)


def test_torch_func_takes_the_plain_path():
    model = tiny.llama()
    attachment = attached(model, dt.LoRA(rank=2).at(EVERY))
    leaves = dict(attachment.leaves.named_parameters(prefix=f"deltas.{attachment.name}"))

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (), tiny.batch(model)).logits.square().mean()

    found = torch.func.grad(loss)({name: leaf.detach() for name, leaf in leaves.items()})
    expected = torch.autograd.grad(loss(leaves), list(leaves.values()))
    torch.testing.assert_close(list(found.values()), list(expected), rtol=1e-10, atol=1e-12)


ORDERS = [
    "IA3().at('ffn.down:in') + LoRA(rank=2).at('ffn.down')",
    "LoRA(rank=2).at('ffn.down') + IA3().at('ffn.down:in')",
]


@torch.no_grad()
@pytest.mark.parametrize("text", [*ORDERS, "ParallelAdapter(size=4).at('ffn.down') + IA3().at('ffn.down:in')"])
def test_a_changed_input_is_seen_by_what_stands_before_it_and_by_nothing_behind(text):
    model = tiny.llama()
    attachment = attached(model, dt.parse(text))
    found = output(model)
    delta = attachment.delta
    if all("merge" not in term.method.breaks for term in delta.terms):
        state = dt.merge(model, attachment)
        attachment.detach()
        model.load_state_dict(state, strict=False)
        torch.testing.assert_close(found, output(model), rtol=1e-10, atol=1e-12)
        return
    second = dt.attach(model, busy(fresh(dt.IA3().at("ffn.down:in"), model)))  # now something stands behind it
    second.detach()
    torch.testing.assert_close(output(model), found, rtol=0, atol=0)


@pytest.mark.parametrize("backward", [True, False])
def test_a_graph_is_gone_when_nobody_holds_it(backward):
    model = tiny.llama().train()
    attached(model, dt.LoRA(rank=2).at(EVERY) + dt.IA3().at("ffn.down:in"))
    for _ in range(3):
        loss = output(model).square().mean()
        if backward:
            loss.backward()
        del loss
    gc.collect()
    assert not any(isinstance(found, Shared | Remake) for found in gc.get_objects())


def test_trace_tells_the_sites_that_train_fused():
    model = tiny.llama()
    dt.attach(model, dt.LoRA(rank=2).at("attn.q[0]") + dt.Adapter(size=2).at("ffn.down[0]:out"))
    found = dt.trace(model, tiny.batch(model))
    assert found.fused == ("model.layers.0.self_attn.q_proj",)
    assert "1 of them train on a fused path" in str(found)


def test_an_input_that_nothing_keeps_is_kept():
    x = torch.randn(3, requires_grad=True)
    assert remake(x) is None
    assert remake(x + 1) is None
    assert remake((x + 1) * 2) is None
    made: Any = remake((x + 1) * x)
    assert torch.equal(made(), (x + 1) * x)
