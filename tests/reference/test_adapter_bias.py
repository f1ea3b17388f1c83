"""AdapterBias against the paper's formula, token by token."""

from __future__ import annotations

import torch

import deltatune as dt
from tests import tiny
from tests.reference.compare import TOLERANCE, by_path, moved, scores


@torch.no_grad()
def test_every_token_gets_as_much_of_the_vector_as_it_asks_for():
    model, weights = moved("bert", dt.AdapterBias())
    reference, called = tiny.bert(), []

    def change(module, args, y, p):
        for i, row in enumerate(args[0]):
            for j, u in enumerate(row):
                alpha = sum(a * k for a, k in zip(p["a"].tolist(), u.tolist(), strict=True)) + p["c"].item()
                y[i, j] += alpha * p["v"]
        called.append(module)
        return y

    for path, leaves in by_path(model, weights).items():
        reference.get_submodule(path).register_forward_hook(lambda m, args, y, p=leaves: change(m, args, y, p))
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)
    assert len(called) == 2


def test_a_layer_has_the_two_widths_and_one():
    assert dt.sites(tiny.bert(), dt.AdapterBias()).parameters == 2 * (48 + 32 + 1)
