"""Leaves that are cast together against leaves that are cast where they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltatune as dt
from deltatune.core.casts import Casts
from tests import tiny
from tests.laws.cases import busy, fresh

DELTAS = [
    dt.LoRA(rank=2) + dt.Adapter(size=4).at("ffn.down:out"),
    dt.VeRA(rank=4),  # its matrices are untrained and shared
    dt.PrefixTuning(length=3) + dt.BitFit(),
    dt.VBLoRA(rank=2),
]


def rough(delta: Any) -> tuple[Any, dt.Attachment]:
    """A model in bfloat16 with a delta in float32."""
    model: Any = tiny.llama().bfloat16()
    attachment = dt.attach(model, busy(fresh(delta, tiny.llama())), check=False)
    assert all(p.dtype == torch.float32 for p in attachment.parameters())
    return model, attachment


def grads(model: Any, attachment: dt.Attachment) -> list[Tensor | None]:
    loss = model(**tiny.batch(model)).logits.float().square().mean()
    return list(torch.autograd.grad(loss, list(attachment.parameters()), allow_unused=True))


@pytest.mark.parametrize("delta", DELTAS, ids=str)
def test_the_gradients_are_those_of_casting_where_they_are_used(delta: Any) -> None:
    model, attachment = rough(delta)
    expected = grads(model, attachment)
    casts = Casts(attachment, torch.bfloat16)
    assert casts.own
    with casts.made():
        found = grads(model, attachment)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def test_behind_the_scope_the_leaves_are_read_as_they_are() -> None:
    model, attachment = rough(dt.LoRA(rank=2))
    casts, batch = Casts(attachment, torch.bfloat16), tiny.batch(model)
    with torch.no_grad():
        with casts.made():
            before = model(**batch).logits
            for p in attachment.parameters():
                p.add_(1.0)
            assert torch.equal(model(**batch).logits, before)
        assert not torch.equal(model(**batch).logits, before)


def test_a_leaf_that_many_sites_share_keeps_its_precision() -> None:
    _, attachment = rough(dt.VBLoRA(rank=2))
    shared = {p.name(leaf) for p in attachment.placements for leaf, d in p.leaves.items() if d.scope == "delta"}
    assert shared
    assert not shared & {name.replace("/", ".") for name in Casts(attachment, torch.bfloat16).own}


def test_in_the_float_type_of_the_leaves_nothing_is_cast() -> None:
    _, attachment = rough(dt.LoRA(rank=2))
    assert not Casts(attachment, torch.float32).own
