"""Frozen blocks: found by what wants a gradient, and skipped without one bit of the logits or the gradients changing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.core.frozen import FrozenBlocks, frozen_blocks
from deltatune.core.site import anatomy
from tests import tiny
from tests.laws.cases import busy

FAMILIES = {**tiny.FAMILIES, "mixtral": tiny.mixtral}
DELTAS = [dt.LastLayers(), dt.LadderSideTuning(), dt.LoRA().at("attn.v[-1]")]


def found(name: str, delta: Any) -> tuple[Any, Callable[[], Any], FrozenBlocks]:
    """A model with a delta that is not neutral, a call on rows of 7 and 5 tokens, and its frozen blocks."""
    model = FAMILIES[name]()
    given = {key: value[:2] for key, value in tiny.batch(model).items()}
    dt.attach(model, busy(dt.init(delta, model)))
    return model, lambda: model(**given).logits, frozen_blocks(model, lambda: model(**given))


def gradients(model: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(logits.square().mean(), list(model.deltas.parameters())))


@contextmanager
def called(blocks: list[nn.Module]) -> Iterator[list[int]]:
    """The rows that linear layers in some blocks are called with."""
    rows: list[int] = []
    linears = [m for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(lambda m, args, y: rows.append(args[0].shape[0])) for m in linears]
    yield rows
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("delta", DELTAS, ids=str)
def test_skipping_them_changes_no_bit(name: str, delta: Any) -> None:
    model, call, frozen = found(name, delta)
    expected = call()
    wanted = gradients(model, expected)
    outputs = frozen.outputs(call)
    with frozen.given(outputs), called([block.module for block in frozen.blocks]) as rows:
        logits = call()
    assert torch.equal(logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, logits), wanted, strict=True))
    made = name in ("t5", "mt5")  # their first block makes the position bias of all, of one row
    assert set(rows) == ({1} if made else set())


@pytest.mark.parametrize(("name", "count"), [("llama", 3), ("bert", 2), ("t5", 2)])
def test_a_ladder_reads_every_block_and_other_methods_the_last_one(name: str, count: int) -> None:
    _, _, ladder = found(name, dt.LadderSideTuning())
    _, _, last = found(name, dt.LastLayers())
    assert (len(ladder.blocks), len(ladder.read)) == (count, count)
    assert (len(last.blocks), len(last.read)) == (count - 1, 1)
    assert last.read == [last.blocks[-1]]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_is_frozen_only_over_a_frozen_encoder(name: str) -> None:
    def where(delta: dt.Delta) -> list[tuple[str, int | None]]:
        return [(block.place.stack, block.place.layer) for block in found(name, delta)[2].blocks]

    both = [("encoder", 0), ("encoder", 1), ("decoder", 0)]
    assert where(dt.LoRA().at("decoder.attn.v[-1]")) == both
    assert where(dt.LoRA().at("cross.v[-1]")) == both
    assert where(dt.LoRA().at("encoder.attn.v[-1]")) == [("encoder", 0)]
    assert where(dt.LoRA().at("head")) == [*both, ("decoder", 1)]


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("delta", [dt.LoRA(), dt.PromptTuning(length=3), dt.BitFit(), dt.Full()], ids=str)
def test_nothing_is_frozen_above_a_delta(name: str, delta: Any) -> None:
    assert found(name, delta)[2].blocks == []


def test_a_stage_that_is_not_trained_any_more_is_frozen_with_its_blocks() -> None:
    model = tiny.llama()
    given = tiny.batch(model)
    bare = model(**given).logits
    dt.attach(model, busy(dt.init(dt.LoRA(), model))).freeze()
    dt.attach(model, dt.LastLayers())
    frozen = frozen_blocks(model, lambda: model(**given))
    expected = model(**given).logits
    with frozen.given(frozen.outputs(lambda: model(**given))):
        assert torch.equal(model(**given).logits, expected)
    assert len(frozen.blocks) == 2 and not torch.equal(expected, bare)


def test_a_stack_that_also_runs_a_prompt_is_left_alone() -> None:
    model = tiny.llama()
    given = tiny.batch(model)
    dt.attach(model, dt.PromptTuning(length=3)).freeze()
    dt.attach(model, dt.LastLayers())
    assert frozen_blocks(model, lambda: model(**given)).blocks == []


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_nothing_is_left_at_the_blocks(name: str) -> None:
    model, call, frozen = found(name, dt.LastLayers())
    blocks = [model.get_submodule(place.path) for place in anatomy(model).places if place.role == "block"]
    with frozen.given(frozen.outputs(call)):
        assert any(type(block) is not type(plain) for block, plain in zip(blocks, _plain(name), strict=True))
    assert [type(block) for block in blocks] == [type(plain) for plain in _plain(name)]
    with pytest.raises(ZeroDivisionError), frozen.given(frozen.outputs(call)):
        _ = 1 / 0
    assert [type(block) for block in blocks] == [type(plain) for plain in _plain(name)]


def _plain(name: str) -> list[nn.Module]:
    model = FAMILIES[name]()
    return [model.get_submodule(place.path) for place in anatomy(model).places if place.role == "block"]
