"""Laws of running: compile, generation with and without a cache, padding, gradient checkpointing, dtypes."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import (
    BACKBONES,
    CAUSAL,
    EVERYWHERE,
    GENERATING,
    METHODS,
    busy,
    cases,
    delta_of,
    fits,
    fresh,
    output,
)


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases(keep=lambda m: "compile" not in m.breaks, prefer="plain"))
def test_fullgraph_compile_sees_late_attach_and_swaps_without_recompiling(method, name):
    torch._dynamo.reset()
    model = BACKBONES[name]()
    given = {k: v for k, v in tiny.batch(model).items()}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    bare = compiled(**given)
    delta = delta_of(method, name)
    one, two = (busy(fresh(delta, model), seed) for seed in (1, 2))
    with dt.attach(model, one) as attachment:
        for weights in (one, one, two):  # twice the first: a prompt's second call finds the keys of its first one
            attachment.set(weights)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            _same(compiled(**given), model(**given))
            after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert after == before
    _same(compiled(**given), bare)


@pytest.mark.parametrize("label", EVERYWHERE)
def test_a_compiled_training_step_is_the_eager_one_and_compiles_no_more(label):
    torch._dynamo.reset()
    method = METHODS[label]
    name = "plain" if fits(method, "plain") else "llama"
    trained = []
    for compiled in (False, True):
        model = BACKBONES[name]()
        attachment = dt.attach(model, busy(fresh(delta_of(method, name), model)))
        optimizer = torch.optim.SGD(attachment.parameters(), lr=0.1)
        given = tiny.batch(model)

        def loss(model=model, given=given):
            y = model(**given)
            return (y if isinstance(y, torch.Tensor) else y.logits).square().mean()

        step = torch.compile(loss, fullgraph=True, backend="eager") if compiled else loss
        graphs = []
        for _ in range(3):
            step().backward()
            optimizer.step()
            optimizer.zero_grad()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert not compiled or graphs[1] == graphs[-1] > 0  # a prompt's second call finds the keys of its first one
        trained.append(attachment.weights.tensors)
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)


def _same(one, two):
    one, two = (y if isinstance(y, torch.Tensor) else y.logits for y in (one, two))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("method", "name"), cases(*GENERATING))
def test_generation_with_and_without_a_cache_agrees(method, name, padding):
    model = BACKBONES[name]()
    given = tiny.batch(model, padding)
    given.pop("decoder_input_ids", None)
    with dt.attach(model, busy(fresh(method, model))):
        texts = [
            model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache, **more)
            for cache in (True, False)
            for more in ({}, {"num_beams": 2})
        ]
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(texts[1], texts[3])


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases("llama", "bert", "t5"))
def test_padding_on_either_side_does_not_change_a_row(method, name):
    model = BACKBONES[name]()
    right, left = tiny.batch(model, "right"), tiny.batch(model, "left")
    mask_right, mask_left = right["attention_mask"].bool(), left["attention_mask"].bool()
    left["input_ids"][mask_left] = right["input_ids"][mask_right]
    with dt.attach(model, busy(fresh(method, model))):
        a, b = output(model, **right), output(model, **left)
        rows = [
            output(
                model,
                **{
                    k: (v[i : i + 1] if k.startswith("dec") else v[i : i + 1][:, mask_right[i]])
                    for k, v in right.items()
                },
            )
            for i in range(3)
        ]
    for i, row in enumerate(rows):
        torch.testing.assert_close((a[i] if name == "t5" else a[i][mask_right[i]]), row[0], rtol=0, atol=2e-5)
        if name != "bert":  # learned positions make BERT itself depend on the side of the padding
            torch.testing.assert_close((b[i] if name == "t5" else b[i][mask_left[i]]), row[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("method", "name"), cases("llama", "gpt2", "bert", "t5"))
def test_gradient_checkpointing_gives_the_same_gradients(method, name):
    gradients = []
    for checkpointed in (False, True):
        model = BACKBONES[name]()
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        attachment = dt.attach(model, busy(fresh(method, model)))
        output(model).float().square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in attachment.named_parameters()})
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases("llama", "t5"))
def test_leaves_stay_float32_on_a_bfloat16_backbone(method, name):
    model = BACKBONES[name]().bfloat16()
    with dt.attach(model, busy(fresh(method, model))) as attachment:
        assert output(model).dtype == torch.bfloat16
        assert {p.dtype for p in attachment.parameters()} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases())
def test_every_port_fires(method, name):
    model = BACKBONES[name]()
    with dt.attach(model, fresh(delta_of(method, name), model)):
        silent = set(dt.trace(model, tiny.batch(model)).silent)
    # the shared table of T5 is looked up through the stacks' own embeddings, which hold the same parameter
    assert silent <= ({"shared"} if method.acts == "tensor" else set())


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_prompts_in_two_attachments_equal_one_after_the_other_in_any_use(name, padding):
    model = BACKBONES[name]()
    given = tiny.batch(model, padding)
    both = dt.PromptTuning(length=2) + dt.PrefixTuning(length=3) + dt.LoRA()
    with dt.attach(model, busy(dt.init(both, model))):
        whole = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        slow = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(whole, slow)
