"""Full and LastLayers against ordinary fine-tuning of the same parameters: three steps of SGD and of AdamW."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, scores

LAST = {
    "llama": ("model.layers.2.",),
    "gpt2": ("transformer.h.1.",),
    "bert": ("bert.encoder.layer.1.",),
    "t5": ("encoder.block.1.", "decoder.block.1."),
}


def three_steps(model, parameters, optimizer):
    optimizer = optimizer(parameters, lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        scores(model).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("delta", [dt.Full(), dt.LastLayers()], ids=str)
def test_three_steps_are_those_of_ordinary_fine_tuning(delta, name, optimizer):
    model, reference = BACKBONES[name](), BACKBONES[name]()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    everything = type(delta) is dt.Full
    chosen = {n: p for n, p in reference.named_parameters() if everything or n.startswith(LAST[name])}
    reference.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    attachment = dt.attach(model, delta)
    assert sum(p.numel() for p in attachment.parameters()) == sum(p.numel() for p in chosen.values())
    three_steps(model, attachment.parameters(), optimizer)
    three_steps(reference, chosen.values(), optimizer)
    with torch.no_grad():
        torch.testing.assert_close(scores(model), scores(reference), **TOLERANCE)
        state = dt.merge(model, attachment)
        attachment.detach()
    merged = {**dict(model.named_parameters()), **{n: t for n, t in state.items() if n in kept}}
    for n, parameter in reference.named_parameters():
        torch.testing.assert_close(merged[n], parameter, rtol=0, atol=1e-6)
        assert torch.equal(kept[n], dict(model.named_parameters())[n])
    assert any((merged[n] - kept[n]).abs().max() > 1e-4 for n in kept)


def test_last_layers_counts_blocks_from_the_end_of_every_stack():
    table = dt.sites(BACKBONES["llama"](), dt.LastLayers(layers=2))
    assert {p.site.path.split(".")[2] for p in table.placements} == {"1", "2"}
    with pytest.raises(dt.DeltaTuneError, match="trains nothing"):
        dt.LastLayers(layers=0)
