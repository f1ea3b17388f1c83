"""Laws of travelling: text, JSON, safetensors, pickle, deepcopy."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch

import deltatune as dt
from tests.laws.cases import BACKBONES, METHODS, busy, cases, delta_of, fresh, output


@pytest.mark.parametrize("label", METHODS)
def test_a_delta_survives_text_and_json_and_compares_by_value(label):
    delta = METHODS[label].at("attn.{q,v}[1:]") + dt.BitFit()
    assert dt.parse(str(delta)) == delta == dt.parse(delta.to_json())
    assert hash(dt.parse(str(delta))) == hash(delta)
    assert delta != dt.BitFit() + METHODS[label].at("attn.{q,v}[1:]")


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases())
def test_a_saved_delta_computes_the_same_on_a_fresh_backbone(method, name, tmp_path):
    model = BACKBONES[name]()
    with dt.attach(model, busy(fresh(delta_of(method, name), model))) as attachment:
        scores = output(model)
        dt.save(attachment, tmp_path)
    again = BACKBONES[name]()
    loaded = dt.load(again, tmp_path)
    assert torch.equal(output(again), scores)
    assert loaded.delta == attachment.delta
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta.json", "delta.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases())
def test_a_copy_of_an_attached_backbone_is_independent(method, name):
    model = BACKBONES[name]()
    attachment = dt.attach(model, busy(fresh(delta_of(method, name), model)), name="mine")
    scores = output(model)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), scores)
    for leaf in attachment.parameters():
        leaf.add_(1.0)
    assert torch.equal(output(twin), scores)
    dt.attachments(twin)["mine"].detach()
    assert dt.attachments(model)["mine"].attached
    assert torch.equal(output(twin), output(BACKBONES[name]()))


@torch.no_grad()
@pytest.mark.parametrize(("method", "name"), cases("llama", "t5", "plain"))
def test_an_attached_backbone_survives_torch_save(method, name):
    model = BACKBONES[name]()
    dt.attach(model, busy(fresh(delta_of(method, name), model)))
    scores, buffer = output(model), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(output(again), scores)


READ = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
ids = torch.arange(6)[None]
torch.save(model(input_ids=ids).logits, sys.argv[1] + ".out")
"""


@torch.no_grad()
def test_an_attached_backbone_with_a_prefix_is_read_by_another_process(tmp_path):
    model = BACKBONES["llama"]()
    dt.attach(model, busy(dt.init(dt.PrefixTuning(length=3) + dt.LoRA(), model)))
    path = tmp_path / "model.pt"
    torch.save(model, path)
    subprocess.run([sys.executable, "-c", READ, str(path)], check=True)
    there = torch.load(f"{path}.out")
    torch.testing.assert_close(there, model(input_ids=torch.arange(6)[None]).logits, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4])
def test_a_flattened_reparameterization_computes_the_same(length):
    model = BACKBONES["t5"]()
    weights = busy(dt.init(dt.Reparam(dt.PrefixTuning(length=length), dt.MLP(size=6, hidden=10)), model))
    with dt.attach(model, weights):
        scores = output(model)
    plain = dt.flatten(model, weights)
    assert str(plain.delta) == f"PrefixTuning(length={length})"
    with dt.attach(model, plain):
        torch.testing.assert_close(output(model), scores, rtol=0, atol=1e-6)
