"""Pools: what is added, routed and removed, what stays resident, and what is refused before anything runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import busy, output

pytestmark = pytest.mark.usefixtures("nothing_learns")


@pytest.fixture
def nothing_learns():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return tiny.llama()


def lora(model, seed, rank=4):
    return busy(dt.init(dt.LoRA(rank=rank), model), seed)


def test_the_issue_of_the_design_page(model):
    weights = {"fr": lora(model, 1), "law": busy(dt.init(dt.PrefixTuning(length=3), model), 2)}
    given = tiny.batch(model, "left")
    with dt.pool(model, weights) as pool, pool.route(["fr", "law", None]):
        texts = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert texts.shape == (3, 10)


def test_a_pool_leaves_nothing_behind(model):
    before, keys, classes = output(model), list(model.state_dict()), [type(m) for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    with dt.pool(model, {"a": lora(model, 1), "b": dt.PromptTuning(length=2)}) as pool:
        assert torch.equal(output(model), before)  # outside a route the backbone is bare
        with pool.route(["a", "b", ("a", "b")]):
            assert not torch.equal(output(model), before)
        assert torch.equal(output(model), before)
    assert torch.equal(output(model), before) and list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == trained


def test_one_name_is_for_all_rows_of_any_batch(model):
    weights, given = lora(model, 1), tiny.batch(model)
    with dt.attach(model, weights):
        alone = output(model)
    with dt.pool(model, {"a": weights, "b": lora(model, 2)}) as pool, pool.route("a"):
        assert torch.equal(output(model), alone)
        one = {name: tensor[:1] for name, tensor in given.items()}
        torch.testing.assert_close(model(**one).logits, alone[:1], rtol=0, atol=1e-6)


def test_an_error_inside_a_route_ends_it(model):
    before = output(model)
    with dt.pool(model, {"a": lora(model, 1)}) as pool:
        with pytest.raises(RuntimeError, match="mine"), pool.route(["a", None, "a"]):
            raise RuntimeError("mine")
        assert torch.equal(output(model), before)
        with pool.route(["a"] * 3):
            assert not torch.equal(output(model), before)


def test_a_delta_attached_beside_a_pool_acts_on_every_row(model):
    beside, own = busy(dt.init(dt.Adapter(size=4), model), 3), lora(model, 1)
    with dt.attach(model, beside), dt.pool(model, {"a": own}) as pool, pool.route(["a", None, "a"]):
        mixed = output(model)
    with dt.attach(model, beside):
        torch.testing.assert_close(mixed[1], output(model)[1], rtol=0, atol=1e-6)
        with dt.attach(model, own):
            torch.testing.assert_close(mixed[0], output(model)[0], rtol=0, atol=1e-6)


def test_the_least_recently_routed_make_room(model):
    members = {name: lora(model, seed) for seed, name in enumerate("abcd")}
    pool = dt.pool(model, members, resident=2)
    alone = {}
    for name, weights in members.items():
        with dt.attach(model, weights):
            alone[name] = output(model)
    for rows in (["a", "b", None], ["c", "b", "b"], ["d", "c", "d"], ["a", "a", "d"]):
        with pool.route(rows):
            mixed = output(model)
            assert "2 resident" in repr(pool)
        for row, name in enumerate(rows):
            if name:
                torch.testing.assert_close(mixed[row], alone[name][row], rtol=0, atol=1e-6)
    with (
        pytest.raises(dt.DeltaTuneError, match=r"needs 3 deltas at once; the pool keeps 2 resident"),
        pool.route(["a", "b", "c"]),
    ):
        pass
    with pool.route(["a", "b", None]):
        pass


def test_members_come_from_weights_deltas_and_folders(model, tmp_path):
    dt.save(lora(model, 1), tmp_path / "own")
    pool = dt.pool(model, {"saved": tmp_path / "own", "fresh": dt.LoRA(rank=2)})
    pool.add("method", dt.BitFit())
    assert pool.names == ("saved", "fresh", "method") and len(pool) == 3 and "saved" in pool
    assert pool["saved"].delta == dt.LoRA(rank=4).at(dt.LoRA.where)
    pool.remove("fresh")
    assert "fresh" not in pool


def test_members_of_a_training_pool_hang_in_the_model_and_are_read_back(model):
    pool = dt.pool(model, {"a": lora(model, 1), "b": lora(model, 2)}, train=True)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names and all(n.startswith(("deltas.pool0.a.", "deltas.pool0.b.")) for n in names)
    for _, leaf in pool["a"].named_parameters():
        leaf.fill_(0.5)
    assert all((t == 0.5).all() for t in pool["a"].weights.tensors.values())
    assert not any((t == 0.5).all() for t in pool["b"].weights.tensors.values())
    pool.remove("a")
    assert not any(".a." in n for n, _ in model.named_parameters())


def refusals(model):
    other = tiny.llama(seed=7)
    foreign = lora(other, 1)
    return {
        "a name twice": (lambda p: p.add("a", lora(model, 2)), "'a' already"),
        "no name": (lambda p: p.add("", lora(model, 2)), "cannot name a delta"),
        "another structure": (lambda p: p.add("x", dt.init(dt.LoRA(), tiny.gpt2())), "made for another backbone: GPT2"),
        "other values": (lambda p: p.add("x", foreign), "same shapes but with other values"),
        "unknown": (lambda p: p.route(["aa", None, None]).__enter__(), "no delta 'aa'.*'a'"),
        "unknown to remove": (lambda p: p.remove("b"), "no delta 'b'"),
        "no rows": (lambda p: p.route([]).__enter__(), "the route is empty"),
        "a tensor lacks": (
            lambda p: p.add("x", replace(lora(model, 1), tensors={})),
            "lack the tensor",
        ),
    }


@pytest.mark.parametrize("case", list(refusals(tiny.llama())))
def test_bad_input_is_refused_and_changes_nothing(case, model):
    pool = dt.pool(model, {"a": lora(model, 1)})
    ask, message = refusals(model)[case]
    with pytest.raises(dt.DeltaTuneError, match=message):
        ask(pool)
    assert pool.names == ("a",)
    with pool.route(["a", None, "a"]):
        output(model)


def test_a_member_is_not_changed_through_the_pool(model):
    weights = lora(model, 1)
    kept = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    pool = dt.pool(model, {"a": weights})
    with pytest.raises(dt.DeltaTuneError, match="remove it and add"):
        pool["a"].set(lora(model, 2))
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("rows", [["a"], ["a", None], ["a"] * 6])
def test_a_route_of_the_wrong_length_is_refused(model, rows):
    given = tiny.batch(model, "left")
    with dt.pool(model, {"a": lora(model, 1)}) as pool, pool.route(rows):
        with pytest.raises(dt.DeltaTuneError, match=f"the route has {len(rows)} rows and the batch 3"):
            model(**given)
        with pytest.raises(dt.DeltaTuneError, match=f"the route has {len(rows)} rows and the batch 3"):
            model.generate(**given, max_new_tokens=2)


def test_what_runs_cannot_be_removed_nor_routed_again(model):
    pool, second = dt.pool(model, {"a": lora(model, 1), "b": lora(model, 2)}), dt.pool(model, {"c": lora(model, 3)})
    with pool.route(["a", None, "a"]):
        with pytest.raises(dt.DeltaTuneError, match="'a' is part of the route that is running"):
            pool.remove("a")
        pool.remove("b")
        for other in (pool, second):
            with pytest.raises(dt.DeltaTuneError, match="a route of 'pool0' is running"), other.route(["c"] * 3):
                pass
    pool.remove("a")
    pool.detach()
    with pytest.raises(dt.DeltaTuneError, match="'pool0' is not on the model any more"), pool.route([None]):
        pass


def test_attention_whose_rows_are_not_in_front_is_refused_by_name():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    with pytest.raises(dt.DeltaTuneError, match="'attention.out_proj' cannot be routed.* no rows"):
        dt.pool(Model(), {"a": dt.LoRA(rank=2).at("path:attention.out_proj")})


def test_a_hidden_state_without_rows_is_refused_by_name():
    delta = dt.Adapter(size=2).at("path:encoder.block.0.layer.0.SelfAttention.relative_attention_bias")
    with pytest.raises(dt.DeltaTuneError, match="'encoder.block.0.*relative_attention_bias' cannot be routed"):
        dt.pool(tiny.t5(), {"a": delta})
