"""The add-norm adapter against its equation, written out on BERT, whose norm follows every sub-layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.reference.compare import TOLERANCE, moved, scores


@torch.no_grad()
@pytest.mark.parametrize("role", ["attn", "ffn"])
def test_it_reads_what_the_norm_behind_the_sublayer_makes_of_the_sum(role):
    model, weights = moved("bert", dt.AddNormAdapter(size=5, activation="tanh").at(role))
    reference, fixed = tiny.bert(), {}
    for i, layer in enumerate(reference.bert.encoder.layer):
        output = layer.attention.output if role == "attn" else layer.output
        begin = layer.attention.self if role == "attn" else layer.intermediate.dense
        name = f"0.{dt.sites(model, weights.delta).placements[i].site.address}"
        p = {leaf: weights.tensors[f"{name}.{leaf}"] for leaf in "DdUu"}
        fixed |= {f"{name}.g": output.LayerNorm.weight.detach(), f"{name}.b": output.LayerNorm.bias.detach()}
        held = {}
        begin.register_forward_pre_hook(lambda m, args, held=held: held.update(x=args[0]))

        def hook(m, args, y, held=held, output=output, p=p):
            z = output.LayerNorm(held["x"] + y)
            return y + torch.tanh(z @ p["D"].T + p["d"]) @ p["U"].T + p["u"]

        output.dense.register_forward_hook(hook)
    bare = scores(model)
    with dt.attach(model, replace(weights, fixed=fixed)):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)


def test_a_fresh_one_norms_without_scale_and_shift_and_trains_what_an_adapter_does():
    model = tiny.bert()
    weights = dt.init(dt.AddNormAdapter(size=5), model)
    assert {t.unique().item() for t in weights.fixed.values()} == {0.0, 1.0}
    assert weights.count == 2 * (2 * 32 * 5 + 5 + 32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dt.AddNormAdapter(size=0), "size=1 or more"),
        (lambda: dt.AddNormAdapter(activation="rely"), "Did you mean 'relu'"),
        (
            lambda: dt.sites(tiny.bert(), dt.AddNormAdapter().at("ffn.up")),
            "acts on a norm or container",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(build, message):
    with pytest.raises(dt.DeltaTuneError, match=message):
        build()
