"""What attaching and merging refuse, with the message, and that a refusal changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES, busy, cases, delta_of, fresh, output

PLACE = "path:blocks.*.first"


def weights_of(model, rank=2):
    return busy(dt.init(dt.LoRA(rank=rank).at(PLACE), model))


def untouched(model):
    return "deltas" not in dict(model.named_children()) and all(p.requires_grad for p in model.parameters())


def test_weights_for_another_structure_are_refused_with_or_without_a_check():
    weights = dt.init(dt.LoRA(rank=2), tiny.mistral())
    for check in (True, False):
        model = tiny.llama()
        with pytest.raises(dt.DeltaTuneError, match=r"another backbone: MistralForCausalLM .*this is LlamaForCausalLM"):
            dt.attach(model, weights, check=check)
        assert untouched(model)


def test_weights_for_other_values_are_refused_unless_meant(tmp_path):
    model = tiny.plain(seed=1)
    dt.save(weights_of(tiny.plain()), tmp_path)
    with pytest.raises(
        dt.DeltaTuneError, match=r"Plain of the same shapes but with other values .*pass check=False if you mean it"
    ):
        dt.load(model, tmp_path)
    assert untouched(model)
    assert dt.load(model, tmp_path, check=False).attached


def changed(weights, case):
    tensors = dict(weights.tensors)
    name = "0.blocks.0.first.A"
    if case == "lacking":
        del tensors[name]
    elif case == "renamed":
        tensors["0.blocks.0.frist.A"] = tensors[name]
    elif case == "misshapen":
        tensors[name] = tensors[name][:1]
    elif case == "whole numbers":
        tensors[name] = tensors[name].long()
    return replace(weights, tensors=tensors)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "lacking",
            r"lack the tensor '0\.blocks\.0\.first\.A' of LoRA\(rank=2\).*Did you mean '0\.blocks\.\d\.first\.\w'",
        ),
        (
            "renamed",
            r"hold the tensor '0\.blocks\.0\.frist\.A', which .* does not declare\. Did you mean '0\.blocks\.0\.first\.A'",
        ),
        ("misshapen", r"'0\.blocks\.0\.first\.A' has the shape \(1, 32\); this backbone needs \(2, 32\)"),
        ("whole numbers", r"'0\.blocks\.0\.first\.A' holds torch\.int64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_everywhere(case, message):
    model = tiny.plain()
    weights = weights_of(model)
    with pytest.raises(dt.DeltaTuneError, match=message):
        dt.attach(model, changed(weights, case))
    assert untouched(model)
    for use in (dt.merge, dt.flatten):
        with pytest.raises(dt.DeltaTuneError, match=message):
            use(model, changed(weights, case))
    attachment = dt.attach(model, weights)
    before = output(model)
    with pytest.raises(dt.DeltaTuneError, match=message):
        attachment.set(changed(weights, case))
    assert torch.equal(output(model), before)


def test_numbers_of_another_delta_are_not_set():
    model = tiny.plain()
    attachment = dt.attach(model, weights_of(model), name="mine")
    with pytest.raises(
        dt.DeltaTuneError, match=r"'mine' holds LoRA\(rank=2\).*; the weights given are for LoRA\(rank=3\)"
    ):
        attachment.set(weights_of(model, rank=3))


@pytest.mark.parametrize(
    "name", ["", "a b", "1st", "a.b", "class", "training", "forward", "attached", "frozen", "_modules", "_parameters"]
)
def test_names_that_are_no_attribute_are_refused(name):
    model = tiny.plain()
    with pytest.raises(dt.DeltaTuneError, match=r"cannot be read as model\.deltas\.<name>; choose a plain name"):
        dt.attach(model, weights_of(model), name=name)
    assert untouched(model)


def test_a_taken_name_is_refused_and_free_ones_are_counted():
    model = tiny.plain()
    weights = weights_of(model)
    first = dt.attach(model, weights)
    second = dt.attach(model, weights)
    assert (first.name, second.name) == ("delta0", "delta1")
    with pytest.raises(
        dt.DeltaTuneError, match=r"'delta1' is attached already \(LoRA\(rank=2\).*\); detach it or choose another"
    ):
        dt.attach(model, weights, name="delta1")
    first.detach()
    assert dt.attach(model, weights).name == "delta0"


@pytest.mark.parametrize("own", [nn.Linear(2, 2), nn.Parameter(torch.zeros(2)), 3])
def test_a_model_with_deltas_of_its_own_is_refused(own):
    model = tiny.plain()
    weights = weights_of(model)
    model.deltas = own
    with pytest.raises(dt.DeltaTuneError, match="of its own, the name that deltatune reserves"):
        dt.attach(model, replace(weights, backbone=dt.fingerprint(model)))
    assert model.deltas is own


def test_a_rank_above_the_dimensions_is_refused_with_them():
    model = tiny.plain()
    with pytest.raises(
        dt.DeltaTuneError, match=r"LoRA\(rank=33\) exceeds the dimensions of 'blocks\.0\.first': 48 x 32"
    ):
        dt.sites(model, dt.LoRA(rank=33).at(PLACE))
    assert dt.sites(model, dt.LoRA(rank=32).at(PLACE)).parameters == 2 * 32 * (32 + 48)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (
            dt.LoRA().at("path:blocks.*"),
            r"LoRA acts on a linear or embedding or conv, but 'path:blocks\.\*' found the container 'blocks\.0'; its default place is",
        ),
        (
            dt.LoRA().at("path:**.scale"),
            r"LoRA acts on a linear or embedding or conv, but .* found the norm 'blocks\.0\.scale'",
        ),
        (dt.BitFit().at("path:table"), r"BitFit acts on a linear or norm, but .* found the embedding 'table'"),
        (dt.Adapter().at("path:blocks.*"), r"the width of 'blocks\.0' is not known; address a linear or a norm"),
        (dt.PrefixTuning().at("path:blocks.*"), r"'blocks\.0' is not an attention whose heads are known"),
        (dt.Delta() + dt.LoRA(), r"names a role, but the roles of Plain are not known"),
    ],
    ids=str,
)
def test_a_method_at_a_place_that_it_cannot_act_on_is_refused(delta, message):
    model = tiny.plain()
    with pytest.raises(dt.DeltaTuneError, match=message):
        dt.attach(model, delta)
    assert untouched(model)


def test_one_role_of_a_packed_module_has_no_parameters_of_its_own():
    with pytest.raises(
        dt.DeltaTuneError,
        match=r"attn\.q is packed with other roles in 'transformer\.h\.0\.attn\.c_attn'; name the whole module",
    ):
        dt.sites(tiny.gpt2(), dt.Full().at("attn.q"))


def test_a_shared_leaf_of_two_widths_is_refused():
    delta = dt.Reparam(dt.Adapter(size=4), dt.MLP(size=3, hidden=3)).at("path:blocks.0.{first,second}")
    with pytest.raises(dt.DeltaTuneError, match=r"an MLP makes leaves of shape \[length, c\]"):
        dt.sites(tiny.plain(), delta)


def test_an_overflow_in_merging_changes_nothing():
    model = tiny.plain().half()
    weights = weights_of(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    attachment = dt.attach(model, weights)
    with torch.no_grad():
        next(attachment.parameters()).fill_(1e6)
    for merge in (dt.merge, dt.merge_):
        with pytest.raises(
            dt.DeltaTuneError, match=r"merged blocks\.0\.first\.weight overflows torch\.float16; nothing was changed"
        ):
            merge(model, attachment)
    with torch.no_grad():
        next(attachment.parameters()).fill_(float("nan"))
    with pytest.raises(dt.DeltaTuneError, match="holds NaN or infinity; nothing was changed"):
        dt.merge_(model, attachment)
    assert attachment.attached
    attachment.detach()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases("plain"))  # transformers models refuse it by themselves
def test_a_batch_without_rows_keeps_its_shape(method, name):
    model = BACKBONES[name]()
    with dt.attach(model, busy(fresh(delta_of(method, name), model))):
        for rows, length in [(0, 7), (2, 0)]:
            assert model(torch.zeros(rows, length, dtype=torch.long)).shape == (rows, length, tiny.VOCABULARY)
