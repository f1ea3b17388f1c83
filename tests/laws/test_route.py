"""Laws of routing: each row of a mixed batch computes, learns and generates what it would alone."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES, GENERATING, busy, cases, delta_of, fresh, output


def real(y, given, row):
    """The scores of a row's own tokens."""
    mask = given.get("attention_mask")
    return y[row] if mask is None or "decoder_input_ids" in given else y[row][mask[row].bool()]


def same(mixed, alone, given, rows=None, atol=1e-10):
    for row in range(len(mixed)) if rows is None else rows:
        torch.testing.assert_close(real(mixed, given, row), real(alone, given, row), rtol=0, atol=atol)


@pytest.mark.parametrize(("method", "name"), cases())
def test_a_mixed_batch_equals_each_row_alone_forward_and_backward(method, name):
    model = BACKBONES[name]().double()
    given = tiny.batch(model, "left") if name == "gpt2" else tiny.batch(model)
    a, b = (busy(fresh(delta_of(method, name), model), seed) for seed in (1, 2))
    bare = output(model, **given)
    alone, gradients = {}, {}
    for key, weights, rows in (("a", a, [0]), ("b", b, [2])):
        with dt.attach(model, weights) as attachment:
            alone[key] = output(model, **given)
            sum(real(alone[key], given, row).square().mean() for row in rows).backward()
            gradients[key] = {n: p.grad for n, p in attachment.named_parameters()}
    with dt.pool(model, {"a": a, "b": b}, train=True) as pool, pool.route(["a", None, "b"]):
        mixed = output(model, **given)
        sum(real(mixed, given, row).square().mean() for row in range(3)).backward()
        learned = {key: {n: p.grad for n, p in pool[key].named_parameters()} for key in "ab"}
    same(mixed, alone["a"], given, [0])
    same(mixed, bare, given, [1])
    same(mixed, alone["b"], given, [2])
    for key in "ab":
        for leaf, gradient in gradients[key].items():
            found = learned[key][leaf]
            gradient = torch.zeros_like(found) if gradient is None else gradient
            torch.testing.assert_close(
                torch.zeros_like(gradient) if found is None else found, gradient, rtol=0, atol=1e-7
            )
    assert torch.equal(output(model, **given), bare)


MIXTURE = {
    "lora4": dt.LoRA(rank=4),
    "lora4b": dt.LoRA(rank=4),
    "lora8": dt.LoRA(rank=8).at("{attn.{q,k,v,o},ffn.{up,down}}"),
    "dora": dt.DoRA(rank=4),
    "adapter": dt.Adapter(size=8),
    "adapter2": dt.Adapter(size=8),
    "parallel": dt.ParallelAdapter(size=8),
    "ia3": dt.IA3(),
    "ia3b": dt.IA3(),
    "bitfit": dt.BitFit(),
    "prefix3": dt.PrefixTuning(length=3),
    "prefix5": dt.PrefixTuning(length=5),
    "prompt2": dt.PromptTuning(length=2),
    "prompt4": dt.PromptTuning(length=4) + dt.LoRA(rank=4),
    "reft": dt.LoReFT(),
    "full": dt.Full(),
}
ROUTE = [*MIXTURE, None, "adapter", ("lora4", "prefix3"), ("prefix5", "ia3", "prompt2")]


def mixture(name, padding, dtype=torch.float64):
    """A model, a pool of the mixture on it, and a batch of one row for each entry of the route."""
    model = BACKBONES[name]().to(dtype)
    weights = {key: busy(fresh(delta, model), seed) for seed, (key, delta) in enumerate(MIXTURE.items())}
    small = tiny.batch(model, padding)
    rows = torch.arange(len(ROUTE)) % 3
    return model, weights, {key: tensor[rows] for key, tensor in small.items()}


def one(given, row, keep):
    """A row as a batch of one, without its padding unless positions are counted from there."""
    mask = given["attention_mask"][row].bool() | keep
    return {k: v[row : row + 1] if k.startswith("decoder") else v[row : row + 1][:, mask] for k, v in given.items()}


def attached(model, weights, entry):
    return [
        dt.attach(model, weights[key])
        for key in ([] if entry is None else [entry] if isinstance(entry, str) else entry)
    ]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_unlike_methods_in_one_batch_equal_each_row_alone(name, padding, dtype):
    model, weights, given = mixture(name, padding, dtype)
    with dt.pool(model, weights) as pool, pool.route(ROUTE):
        mixed = output(model, **given)
    assert len(weights) >= 8
    for row, entry in enumerate(ROUTE):
        links = attached(model, weights, entry)
        found, (alone,) = real(mixed, given, row), output(model, **one(given, row, keep=name in ("bert", "gpt2")))
        found, alone = (
            (found, alone) if len(found) == len(alone) else (found, alone[given["attention_mask"][row].bool()])
        )
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5, msg=str(entry))
        for link in links:
            link.detach()


HOW = {
    "greedy": {"do_sample": False},
    "no cache": {"do_sample": False, "use_cache": False},
    "beams": {"num_beams": 3},
    "returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", GENERATING)
def test_generation_of_a_mixed_batch_equals_each_row_alone(name, padding, how):
    model, weights, given = mixture(name, "left" if name == "gpt2" else padding)
    given.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, **HOW[how]}
    count = settings.get("num_return_sequences", 1)
    with dt.pool(model, weights) as pool, pool.route(ROUTE):
        mixed = model.generate(**given, **settings)[:, -4:]
    for row, entry in list(enumerate(ROUTE))[:: 1 if how == "greedy" else 3]:
        links = attached(model, weights, entry)
        alone = model.generate(**{k: v[row : row + 1] for k, v in given.items()}, **settings)[:, -4:]
        assert torch.equal(mixed[row * count : (row + 1) * count], alone), entry
        for link in links:
            link.detach()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_compiled_model_sees_routes_and_keeps_its_graph_for_another_of_the_same_form(name):
    torch._dynamo.reset()
    model = BACKBONES[name]()
    given = tiny.batch(model)
    methods = {"a": dt.LoRA(rank=4), "b": dt.LoRA(rank=4), "c": dt.Adapter(size=4), "d": dt.Adapter(size=4)}
    weights = {key: busy(fresh(delta, model), seed) for seed, (key, delta) in enumerate(methods.items())}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with dt.pool(model, weights) as pool:
        for route in (["a", "b", "c"], ["b", "a", "d"], [None, "c", "a"], ["a", "a", "a"]):
            with pool.route(route):
                before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                same(compiled(**given).logits, model(**given).logits, given, atol=1e-5)
                after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            if route == ["b", "a", "d"]:
                assert after == before
    torch.testing.assert_close(compiled(**given).logits, output(model, **given), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_checkpointed_blocks_run_again_under_their_route(name):
    gradients = []
    for checkpointed in (False, True):
        model, weights, given = mixture(name, "right", torch.float32)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with dt.pool(model, weights, train=True) as pool, pool.route(ROUTE):
            output(model, **given).float().square().mean().backward()
            gradients.append({f"{k} {n}": p.grad for k in weights for n, p in pool[k].named_parameters()})
    for leaf, gradient in gradients[0].items():
        again = gradients[1][leaf]
        assert (again is None) == (gradient is None), leaf
        if gradient is not None:
            torch.testing.assert_close(again, gradient, rtol=1e-4, atol=1e-6, msg=leaf)


def test_a_checkpointed_backward_pass_outside_its_route_is_an_error():
    model, weights, given = mixture("llama", "right", torch.float32)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with dt.pool(model, {"a": weights["lora8"], "b": weights["adapter"]}, train=True) as pool:
        with pool.route(["a", "b", None]):
            loss = output(model, **{name: tensor[:3] for name, tensor in given.items()}).square().mean()
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            loss.backward()


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_every_family_keeps_the_rows_of_a_mixed_batch_apart(name, padding):
    model = tiny.FAMILIES[name]()
    weights = {}
    for seed, key in enumerate(
        ("lora4", "lora4b", "ia3", "adapter", "parallel", "prefix3", "prompt2", "prompt4", "full")
    ):
        weights[key] = busy(fresh(MIXTURE[key], model), seed)
    route = [*weights, None, ("lora4", "prefix3"), ("prompt2", "ia3")]
    rows = torch.arange(len(route)) % 3
    given = {key: tensor[rows] for key, tensor in tiny.batch(model, padding).items()}
    with dt.pool(model, weights) as pool, pool.route(route):
        mixed = output(model, **given)
    for row, entry in enumerate(route):
        links = attached(model, weights, entry)
        short = {key: tensor[row : row + 1] for key, tensor in given.items()}
        alone, found = real(output(model, **short), short, 0), real(mixed, given, row)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=2e-5, msg=f"{entry}")
        for link in links:
            link.detach()
