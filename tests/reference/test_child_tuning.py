"""Task-free child-tuning against fine-tuning whose gradients are masked by hand, as in the paper's algorithm 1."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.core.method import Bag
from tests import tiny
from tests.laws.cases import output

PLACE = "path:blocks.*.{first,second}"


def test_three_steps_are_three_steps_of_fine_tuning_with_masked_gradients():
    method, model, reference = dt.ChildTuning(keep=0.4), tiny.plain(), tiny.plain()
    attachment = dt.attach(model, method.at(PLACE))
    names = {n.removeprefix("0.").removesuffix(".value"): p for n, p in attachment.named_parameters()}
    masks = {n: attachment.leaves._buffers[f"0/{n.replace('.', '/')}/mask"] for n in names}
    assert all(torch.equal(m, torch.ones_like(m)) for m in masks.values())
    theirs = {n: reference.get_parameter(n) for n in names}
    generator = torch.Generator().manual_seed(0)
    ours_opt, their_opt = (torch.optim.Adam(list(t.values()), lr=1e-2) for t in (names, theirs))
    for _ in range(3):
        drawn = {n: method.draw(Bag({"mask": m}), generator)["mask"] for n, m in masks.items()}
        for name, mask in masks.items():
            mask.copy_(drawn[name])
        for net, optimizer in ((model, ours_opt), (reference, their_opt)):
            optimizer.zero_grad()
            output(net).square().mean().backward()
        for name, parameter in theirs.items():
            parameter.grad *= drawn[name]
        for name in names:
            torch.testing.assert_close(names[name].grad, theirs[name].grad, rtol=1e-5, atol=1e-8)
        ours_opt.step()
        their_opt.step()
    torch.testing.assert_close(output(model), output(reference), rtol=0, atol=1e-5)


def test_the_mask_keeps_the_mean_gradient():
    mask = dt.ChildTuning(keep=0.25).draw(Bag({"mask": torch.ones(4000)}), torch.Generator().manual_seed(1))["mask"]
    assert set(mask.tolist()) == {0.0, 4.0}
    assert abs(mask.mean() - 1) < 0.1


def test_it_trains_everything_it_is_put_at():
    assert dt.sites(tiny.plain(), dt.ChildTuning().at(PLACE)).parameters == 2 * (2 * 32 * 48 + 48 + 32)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match=r"keep=0.*above 0 and up to 1"):
        dt.ChildTuning(keep=0.0)
