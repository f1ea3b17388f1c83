"""The invertible adapter against MAD-X's coupling written out, forth behind the embedding and back before the head."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from tests import tiny
from tests.reference.compare import TOLERANCE, moved, scores


def subnet(p, name):
    """Return one coupling network as torch layers that hold our numbers."""
    first, second = p[f"{name}1"], p[f"{name}2"]
    net = nn.Sequential(
        nn.Linear(first.shape[1], first.shape[0]), nn.ReLU(), nn.Linear(second.shape[1], second.shape[0])
    )
    held = {"0.weight": first, "0.bias": p[f"{name.lower()}1"], "2.weight": second, "2.bias": p[f"{name.lower()}2"]}
    net.load_state_dict(held)
    return net


def coupling(p, half):
    F, G = subnet(p, "F"), subnet(p, "G")

    def forth(e):
        e1, e2 = e[..., :half], e[..., half:]
        o1 = e1 + F(e2)
        return torch.cat([o1, e2 + G(o1)], -1)

    def back(o):
        o1, o2 = o[..., :half], o[..., half:]
        e2 = o2 - G(o1)
        return torch.cat([o1 - F(e2), e2], -1)

    return forth, back


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_model_sees_the_other_space_and_the_head_its_own(name):
    model, weights = moved(name, dt.InvertibleAdapter())
    reference = getattr(tiny, name)()
    p = {n.removeprefix("0.*."): t for n, t in weights.tensors.items()}
    assert len(p) == 8  # all shared
    forth, back = coupling(p, 16)
    reference.get_input_embeddings().register_forward_hook(lambda m, args, y: forth(y))
    reference.get_output_embeddings().register_forward_pre_hook(lambda m, args: (back(args[0]), *args[1:]))
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("width", [10, 7])
def test_the_way_back_undoes_the_way_there(width):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, width), nn.Linear(width, 20)

        def forward(self, ids):
            return self.head(self.table(ids))

    model = tiny.seeded(Two)
    weights = dt.init(dt.InvertibleAdapter(up=dt.Normal(0.5)).at("{path:table:out,path:head:in}"), model)
    ids = torch.arange(20)
    before = model(ids)
    with dt.attach(model, weights):
        there = model.table(ids)
        torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-5)
    assert (there - model.table(ids)).abs().max() > 1e-3


def test_the_tensors_are_counted_once():
    d = 32
    assert dt.sites(tiny.llama(), dt.InvertibleAdapter()).parameters == d * d // 2 + 3 * d // 2
    with pytest.raises(dt.DeltaTuneError, match=r"halves a width twice; '0' has 2, it needs 4"):
        dt.sites(nn.Sequential(nn.Linear(9, 2)), dt.InvertibleAdapter().at("path:0:out"))
