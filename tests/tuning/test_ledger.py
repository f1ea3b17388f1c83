"""The ledger counts what a real step holds, to the byte, without holding it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import deltatune as dt
from deltatune.tuning.budget import beside, within
from deltatune.tuning.deterministic import deterministic
from deltatune.tuning.forecast import kind_of, made_up, writing
from deltatune.tuning.ledger import Ledger, Shape, Trial, block_paths, ledger
from deltatune.tuning.memory import in_use, size
from deltatune.tuning.precision import hold_in
from deltatune.tuning.rates import Rates
from deltatune.tuning.recipe import Recipe, Run
from deltatune.tuning.tally import Tally
from tests import tiny

BACKBONES = {"llama": tiny.llama, "t5": tiny.t5, "bert": tiny.bert, "gpt2": tiny.gpt2}
DELTAS = {
    "LoRA": dt.LoRA(rank=4),
    "Adapter": dt.Adapter(size=4),
    "IA3": dt.IA3(),
    "BitFit": dt.BitFit(),
    "Full": dt.Full(),
    "PrefixTuning": dt.PrefixTuning(length=3),
    "PromptTuning": dt.PromptTuning(length=3),
    "FISH": dt.FISH(share=0.1),
    "DoRA": dt.DoRA(rank=2),
}
SHAPE = Shape(3, 12, 5)
CPU, HELD = torch.device("cpu"), 500 << 20


def real(model: Any, delta: Any, recipe: Recipe, blocks: tuple[str, ...] = ()) -> Ledger:
    """The same step on a real model, real tensors counted."""
    from deltatune.core.delta import as_delta
    from deltatune.core.weights import Weights, fingerprint

    with deterministic(CPU), Tally(tiny.VOCABULARY) as counted:
        hold_in(model, recipe.precision)
        trial = Trial(counted, model, Weights(as_delta(delta), {}, fingerprint(model), 0), recipe, CPU, blocks)
        trial.step(SHAPE)
    return trial.ledger(None, blocks)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("method", DELTAS)
def test_fakes_take_what_real_tensors_take(name: str, method: str) -> None:
    model, delta, random = BACKBONES[name](), DELTAS[method], torch.get_rng_state()
    planned = ledger(model, delta, SHAPE)
    assert torch.equal(torch.get_rng_state(), random)
    assert "deltas" not in model._modules and not any(p.grad is not None for p in model.parameters())
    if method in ("FISH",):  # its places are numbers that have to exist
        return
    assert planned == real(model, delta, Recipe())


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_in_float32_is_planned_in_bfloat16_as_it_will_be_held(name: str) -> None:
    model, recipe = BACKBONES[name](), Recipe(precision="bf16")
    planned, whole = (ledger(model, dt.LoRA(rank=4), SHAPE, one) for one in (recipe, Recipe()))
    assert planned.backbone < 0.6 * whole.backbone and planned.delta == whole.delta
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert planned == real(model, dt.LoRA(rank=4), recipe)


def test_components_are_what_arithmetic_says() -> None:
    model, delta = tiny.llama(), dt.LoRA(rank=4)
    count = dt.sites(model, delta).parameters
    leaves = len(dt.init(delta, model).tensors)
    whole = sum(p.numel() * 4 for p in {id(p): p for p in model.parameters()}.values())
    buffers = sum(b.nbytes for b in model.buffers())
    found = {name: ledger(model, delta, SHAPE, Recipe(optimizer=name)) for name in ("adamw", "sgd")}
    for one in found.values():
        assert one.backbone == whole + buffers and one.delta == 4 * count
        assert one.growth == one.peak - one.backbone - one.delta
    assert found["adamw"].optimizer == 4 * (2 * count + leaves) and found["sgd"].optimizer == 4 * count
    longer = ledger(model, delta, Shape(6, 12, 5))
    assert longer.activations > 1.8 * found["adamw"].activations and longer.optimizer == found["adamw"].optimizer


def test_a_shape_of_eight_billion_is_planned_on_the_meta_device() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=32, num_key_value_heads=8, **sizes)).bfloat16()
    before = in_use(CPU)
    one = ledger(model, dt.LoRA(rank=8), Shape(1, 512), price=Rates(1e12, 1e10).seconds)
    assert in_use(CPU) - before < 1 << 28 and one.backbone > 2 * 8_030_000_000
    products = 2 * 2 * 512 * 8e9  # forward, and backward to the hidden states
    assert one.seconds is not None and products * 0.8 / 1e12 < one.seconds < products * 1.6 / 1e12


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_an_evaluation_is_planned_by_scoring(name: str) -> None:
    model = BACKBONES[name]()
    few = ledger(model, dt.IA3(), SHAPE, evaluate=made_up(model, SHAPE, Recipe(eval_batch=2), 2))
    many = ledger(model, dt.IA3(), SHAPE, evaluate=made_up(model, SHAPE, Recipe(eval_batch=400), 2))
    assert few.peak_in == "training" and 0 < few.evaluation < many.evaluation
    assert many.peak_in == "evaluation" and many.peak > few.peak
    assert bool(many.cache) == (name != "bert")


def test_the_fewest_blocks_keep_a_budget() -> None:
    model, delta = tiny.llama(), dt.LoRA(rank=2)
    made = [ledger(model, delta, SHAPE, recomputed=block_paths(model)[:count]) for count in range(4)]
    peaks = [one.peak for one in made]

    @cache
    def made_for(paths: tuple[str, ...]) -> Ledger:
        return ledger(model, delta, SHAPE, recomputed=paths)

    def planned(paths: Any) -> Ledger:
        return made_for(tuple(paths))

    assert within(0, planned).recomputed == within(peaks[0], planned).recomputed == ()
    for budget in {*peaks, peaks[0] - 1}:
        if budget < min(peaks):
            continue
        found = within(budget, planned)
        fewest = next(count for count, peak in enumerate(peaks) if peak <= budget)
        assert found.peak <= budget and len(found.recomputed) == fewest
    assert min(peaks) < peaks[0]
    with pytest.raises(dt.DeltaTuneError, match=r"cannot be kept: .* is the least that can be reached"):
        within(1 << 10, planned)
    held = beside(made[0], 1 << 30)
    assert held.peak == (1 << 30) + made[0].growth


@pytest.mark.parametrize(
    ("text", "bytes"), [("0", 0), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("800mib", 800 << 20), ("7k", 7000)]
)
def test_an_amount_of_memory_is_read(text: str, bytes: int) -> None:
    assert size(text) == bytes


@pytest.mark.parametrize("text", ["", "much", "2 XB", "-1GB", "1.2.3GB", "GB"])
def test_anything_else_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(dt.DeltaTuneError, match="is no amount of memory; write for example 2GB"):
        size(text)


def test_a_budget_changes_no_number_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltatune.tuning import forecast, heap, tune

    monkeypatch.setattr(heap, "give_back", lambda: False)  # it would stay so for the other tests
    monkeypatch.setattr(forecast, "resident", lambda device: HELD)
    run = Run("LoRA(rank=2)", "pebble", "topic", Recipe(steps=3, eval_every=3, dev_limit=8, test=False))
    plain = tune(run, tmp_path / "plain", memory_budget=0)
    found = plain["memory"]
    assert found["planned"] == found["resident"] + found["ledger"]["growth"] and not found["ledger"]["recomputed"]
    step = plain["longest_step_seconds"]
    assert step["planned"] == found["ledger"]["seconds"] > 0 and step["measured"] > 0
    with pytest.raises(dt.DeltaTuneError, match="cannot be kept"):
        tune(run, tmp_path / "tight", memory_budget=HELD)
    tight = tune(run, tmp_path / "tight", memory_budget=HELD + found["ledger"]["growth"] * 4 // 5)
    memory = tight["memory"]
    assert memory["ledger"]["recomputed"] and memory["planned"] <= memory["budget"]
    assert tight["id"] == plain["id"]
    assert tight["dev"] == plain["dev"] and tight["train_loss"] == plain["train_loss"]
    for one, other in zip(*(log(tmp_path / name) for name in ("plain", "tight")), strict=True):
        assert one.get("loss") == other.get("loss")
    again = Run("LoRA(rank=2)", "pebble", "topic", Recipe(steps=1, eval_every=0, test=False))
    unplanned = tune(again, tmp_path / "unplanned")
    assert unplanned["memory"] is None and unplanned["longest_step_seconds"] is None


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_command_prints_the_ledger() -> None:
    from deltatune.cli.app import app

    asked = ["plan", "pebble", "--delta", "BitFit()", "--batch", "2", "--length", "16"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("backbone", "optimizer", "logits", "peak, in", "a step"))
    given = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)
    assert given["peak"] == sum(given[name] for name in ("process", "backbone", "delta", "growth"))
    assert given["delta"] == 4 * dt.sites(dt.load_backbone("pebble").model, dt.BitFit()).parameters


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read as Linux tells it"
)
def test_a_process_takes_what_was_planned() -> None:
    pytest.importorskip("peft")
    from benchmarks.ledger import LLAMA, METHODS, batch, in_a_process, model_of

    planned = ledger(model_of(LLAMA), dt.parse(METHODS["PrefixTuning"]), batch(LLAMA), Recipe())
    found = in_a_process(LLAMA, "PrefixTuning", 2, True)
    assert abs(planned.growth / (found["peak"] - found["held"]) - 1) < 0.1


def test_what_cannot_be_planned_says_so() -> None:
    with pytest.raises(dt.DeltaTuneError, match="this cannot be planned without running it: tensors used as indices"):
        ledger(tiny.llama(), dt.AdaMSS(rank=2, groups=2), SHAPE)
    with pytest.raises(dt.DeltaTuneError, match="has no config that says what it reads; give a transformers model"):
        ledger(tiny.plain(), dt.LoRA().at("path:*"), SHAPE)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_writing_reads_as_much_as_is_written(name: str) -> None:
    model, recipe = BACKBONES[name](), Recipe(eval_batch=300)
    kind = kind_of(model)
    short, long = (ledger(model, dt.IA3(), SHAPE, recipe, writing(kind, [(1,) * 8] * 400, recipe, n)) for n in (2, 20))
    assert long.cache > short.cache > 0 and long.evaluation > short.evaluation
