"""HyperFormer against adapters whose weights are made by plain loops, put behind the sub-layers by forward hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES
from tests.reference.compare import by_path, moved, scores

SIZE, E, H = 3, 5, 7


def generated(leaves: dict[str, Any], task: int) -> tuple[Tensor, Tensor]:
    """Return D [size, d] and U [d, size] that the network makes for one site."""
    source = torch.cat([leaves["z"][task], leaves["l"]])
    hidden = (leaves["H1"] @ source + leaves["h1"]).clamp(min=0)
    code = leaves["H2"] @ hidden + leaves["h2"]
    d = tiny.WIDTH
    D = torch.stack([leaves[f"GD{tiny.WIDTH}"][i * d : (i + 1) * d] @ code for i in range(SIZE)])
    U = torch.stack([leaves[f"GU{tiny.WIDTH}"][i * SIZE : (i + 1) * SIZE] @ code for i in range(d)])
    return D, U


@torch.no_grad()
@pytest.mark.parametrize("task", [0, 2])
def test_generated_adapters_follow_the_sublayers(task):
    delta = dt.HyperFormer(size=SIZE, embedding=E, hidden=H, tasks=3, task=0)
    model, weights = moved("llama", delta, size=0.5)
    reference = BACKBONES["llama"]()
    for path, leaves in by_path(model, weights).items():
        D, U = generated(leaves, task)

        def hook(module, args, y, D=D, U=U):
            return y + torch.nn.functional.gelu(y @ D.T) @ U.T

        reference.get_submodule(path).register_forward_hook(hook)
    bare = scores(model)
    with dt.attach(model, dt.of_task(weights, task)):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), rtol=1e-4, atol=1e-4)


def test_all_but_the_sites_embeddings_is_shared():
    d = tiny.WIDTH
    table = dt.sites(BACKBONES["llama"](), dt.HyperFormer(size=SIZE, embedding=E, hidden=H, tasks=3))
    assert table.parameters == 6 * E + 3 * E + H * (3 * E + 1) + E + 2 * d * SIZE * E
    wide = dt.HyperFormer(size=SIZE, embedding=E, hidden=H, tasks=3).at("ffn.{up,down}:out")  # one pair for each width
    assert dt.sites(BACKBONES["llama"](), wide).parameters == table.parameters + 2 * tiny.FFN * SIZE * E


def test_nonsense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="has no task 1; write one of 0 to 0"):
        dt.HyperFormer(task=1)
    with pytest.raises(dt.DeltaTuneError, match="hidden=0"):
        dt.HyperFormer(hidden=0)
