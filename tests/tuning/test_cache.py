"""The cache of frozen blocks: a training with it is the training without it, however often it is stopped."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.errors import DeltaTuneError
from deltatune.tuning import tune, widths
from deltatune.tuning.cache import Bound, Cache, Data, NoCache, frozen_cache
from deltatune.tuning.encode import IGNORED, Codec, Row, collate, epoch_order
from deltatune.tuning.recipe import Recipe, Run
from tests.tuning import backbones as tiny
from tests.tuning import training

# Three epochs of eight batches; AdamW would blow up the rounding of a key's bias, whose gradient is zero.
RECIPE = dataclasses.replace(training.RECIPE, dropout=False, optimizer="sgd")
DELTAS = ["LastLayers()", "LadderSideTuning()", 'LoRA().at("ffn.up[-1]")', 'LoRA().at("head")']


class Stopped(Exception):
    """Stands in for a kill."""


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what differs between any two trainings."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "memory")} for line in log]


def trained(
    folder: Path,
    kind: str = "causal",
    delta: str = DELTAS[0],
    bound: Bound | None = None,
    stops: tuple[int, ...] = (),
    recipe: Recipe = RECIPE,
) -> tuple[list[dict[str, Any]], list[torch.Tensor], Any]:
    """The log, the parameters and the cache of a training that is stopped in some steps and then continued."""
    folder.mkdir()
    for stop in (*stops, 0):

        def on_step(line: dict[str, Any], stop: int = stop) -> None:
            if line["step"] == stop:
                raise Stopped

        loop = training.make(folder, recipe, on_step, tiny.KINDS[kind](), delta)
        loop.bound = bound or Bound()
        try:
            loop.run()
        except Stopped:
            continue
    return lines(folder), [p.detach().clone() for p in loop.parameters], loop.cache


@pytest.mark.parametrize(
    ("kind", "delta"),
    [(kind, delta) for at, kind in enumerate(tiny.KINDS) for delta in (DELTAS[0], DELTAS[1 + at % 3])],
)
def test_it_changes_nothing(kind: str, delta: str, tmp_path: Path) -> None:
    off, parameters, none = trained(tmp_path / "off", kind, delta, Bound(0))
    on, same, cache = trained(tmp_path / "on", kind, delta)
    assert isinstance(none, NoCache) and isinstance(cache, Cache)
    first = [[line for line in log if line["step"] <= 8 and "loss" in line] for log in (on, off)]
    everything = len(cache.frozen.blocks) in (2, 4)  # the last block ran on all tokens, and without a cache on few
    assert everything or first[0] == first[1]
    for one, other in zip(on, off, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    torch.testing.assert_close(same, parameters, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("bound", [Bound(), Bound(8000)], ids=str)
def test_it_fills_batches_of_few_widths(
    kind: str, bound: Bound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny backbone stays in float32: what a low precision changes in a loop is how wide its batches are."""
    monkeypatch.setattr(widths, "INPUTS", 1)
    recipe = dataclasses.replace(RECIPE, precision="bf16")
    off, parameters, _ = trained(tmp_path / "off", kind, bound=Bound(0), recipe=recipe)
    on, same, cache = trained(tmp_path / "on", kind, bound=bound, recipe=recipe)
    assert isinstance(cache, Cache)
    for one, other in zip(on, off, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    torch.testing.assert_close(same, parameters, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bound", [Bound(), Bound(on_disk=True), Bound(8000)], ids=str)
def test_a_training_that_was_stopped_has_the_same_bits(bound: Bound, tmp_path: Path) -> None:
    """Stopped in the first epoch, in the second and in the third, with a checkpoint every four steps."""
    whole = trained(tmp_path / "whole", bound=bound)
    parts = trained(tmp_path / "parts", bound=bound, stops=(6, 11, 19))
    assert parts[0] == whole[0]
    assert all(torch.equal(a, b) for a, b in zip(parts[1], whole[1], strict=True))
    assert [path.name for path in (tmp_path / "parts").iterdir() if path.stat().st_size > 1 << 16] == []


def data(kind: str) -> tuple[Any, Data]:
    backbone = tiny.KINDS[kind]()
    codec = Codec(backbone, RECIPE.max_input, RECIPE.max_target)
    rows = training.rows(codec)
    groups = epoch_order([row.tokens for row in rows], RECIPE.batch, 0, 0)
    return backbone.model, Data(rows, groups, lambda own: collate(own, codec.pad))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_row_has_the_states_of_its_batch_in_the_first_epoch(kind: str, tmp_path: Path) -> None:
    model, given = data(kind)
    dt.attach(model, dt.LadderSideTuning())
    cache = frozen_cache(model, given, RECIPE, Bound(), tmp_path)
    assert isinstance(cache, Cache)
    for group in given.groups[::-1]:
        batch = given.batch(group)
        plain = model(**batch).loss
        with cache.given([given.rows[index] for index in group]):
            assert torch.equal(model(**batch).loss, plain)
        for h, wanted in zip(cache.outputs(group), cache.frozen.outputs(lambda b=batch: model(**b)), strict=True):
            for row, index in enumerate(group):
                length = given.length(cache.frozen.read[0].place.stack, index)
                assert torch.equal(h[row, :length], wanted[row, :length]) and not h[row, length:].any()
    mixed = [group[0] for group in given.groups]
    apart = cache.frozen.outputs(lambda: model(**given.batch(mixed)))
    for index, (h, wanted) in enumerate(zip(cache.outputs(mixed)[0], apart[0], strict=True)):
        length = given.length(cache.frozen.read[0].place.stack, mixed[index])
        torch.testing.assert_close(h[:length], wanted[:length])


@pytest.mark.parametrize("room", [3000, 8000, 19200, 10**9])
def test_it_keeps_within_its_bound_and_takes_the_first_batches(room: int, tmp_path: Path) -> None:
    model, given = data("causal")
    dt.attach(model, dt.LastLayers())
    cache = frozen_cache(model, given, RECIPE, Bound(room), tmp_path)
    assert isinstance(cache, Cache)
    tokens = sum(len(given.rows[index].input) for index in cache.kept)
    assert cache.report["bytes"] == tokens * 16 * 4 <= room
    whole = [index for group in given.groups for index in group]
    assert cache.kept == set(whole[: len(cache.kept)])
    assert (len(cache.kept) == 30) == (room >= 19200)


def refused(delta: str, tmp_path: Path, changes: dict[str, Any], bound: Bound) -> str:
    model, given = data("causal")
    dt.attach(model, dt.parse(delta))
    cache = frozen_cache(model, given, dataclasses.replace(RECIPE, **changes), bound, tmp_path)
    assert isinstance(cache, NoCache)
    return cache.report["off"]


def test_it_says_why_it_is_not_used(tmp_path: Path) -> None:
    last = DELTAS[0]
    assert "no room" in refused(last, tmp_path, {}, Bound(0))
    assert "do not hold one batch" in refused(last, tmp_path, {}, Bound(100))
    assert "dropout" in refused(last, tmp_path, {"dropout": True}, Bound())
    assert "seen twice" in refused(last, tmp_path, {"steps": 8}, Bound())
    assert "no block lies below" in refused("LoRA()", tmp_path, {}, Bound())


def test_a_frozen_prompt_in_the_same_rows_keeps_it_away(tmp_path: Path) -> None:
    model, given = data("seq2seq")
    dt.attach(model, dt.PromptTuning(length=3)).freeze()
    dt.attach(model, dt.LastLayers())
    cache = frozen_cache(model, given, RECIPE, Bound(), tmp_path)
    assert "not of the examples" in cache.report["off"]


def test_a_full_disk_is_an_error_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    model, given = data("causal")
    dt.attach(model, dt.LastLayers())
    with pytest.raises(DeltaTuneError, match=r"no room for a cache of 19,200 bytes in .*No space left.*smaller"):
        frozen_cache(model, given, RECIPE, Bound(on_disk=True), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_tells_what_it_kept(tmp_path: Path) -> None:
    recipe = Recipe(steps=6, eval_every=0, checkpoint_every=0, max_input=24, max_target=4, test=False)
    run = Run("LastLayers()", training.write_backbone(tmp_path / "b"), training.write_task(tmp_path / "t"), recipe)
    kept = tune(run, tmp_path / "on")["cache"]
    assert (kept["skipped"], kept["kept"], kept["examples"]) == (["model.layers.0"], ["model.layers.0"], 64)
    assert tune(run, tmp_path / "off", cache=Bound(0))["cache"] == {"off": "no room is given to it"}


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "masked"])
def test_batches_may_be_padded_further_than_their_rows(kind: str, tmp_path: Path) -> None:
    model, given = data(kind)

    def wider(own: Sequence[Row]) -> dict[str, torch.Tensor]:
        fills = {"labels": IGNORED}
        return {
            name: torch.nn.functional.pad(t, (0, 16 - t.shape[1]), value=fills.get(name, 0))
            for name, t in given.collate(own).items()
        }

    given_wider = dataclasses.replace(given, collate=wider)
    dt.attach(model, dt.LoRA().at("head"))
    cache = frozen_cache(model, given_wider, RECIPE, Bound(), tmp_path)
    assert isinstance(cache, Cache)
    for group in given.groups:
        batch = given_wider.batch(group)
        with cache.given([given.rows[index] for index in group]):
            skipped = model(**batch).loss
        assert torch.equal(skipped, model(**batch).loss)


def test_rows_that_are_equal_are_rows_of_their_own(tmp_path: Path) -> None:
    model, given = data("causal")
    twins = [Row(row.input, row.labels) for row in given.rows[:4]] + list(given.rows[:4])
    given = dataclasses.replace(given, rows=twins, groups=[[0, 5], [4, 1], [2, 3], [6, 7]])
    dt.attach(model, dt.LastLayers())
    cache = frozen_cache(model, given, RECIPE, Bound(), tmp_path)
    assert isinstance(cache, Cache) and len(cache.kept) == 8
    torch.testing.assert_close(cache.outputs([0, 1]), cache.outputs([4, 5]))
