"""The loop: what it learns, logs, keeps, and how it stops."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatune.errors import DeltaTuneError
from deltatune.tuning import checkpoint
from deltatune.tuning.encode import Codec, collate
from deltatune.tuning.loop import NonFiniteLoss, put
from deltatune.tuning.optim import learning_rate
from deltatune.tuning.recipe import Recipe
from deltatune.tuning.score import choose, score_candidates
from tests.tuning import backbones as tiny
from tests.tuning import training

RECIPE = dataclasses.replace(training.RECIPE, dropout=False)
EVERY = 'LoRA(rank=2).at("{attn.{q,k,v,o},cross.{q,k,v,o}?,ffn.{gate?,up,down}}")'


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_tiny_backbone_learns_a_trivial_task(kind: str, tmp_path: Path) -> None:
    """Name the one informative word: chance and majority are 1 in 4."""
    from deltatune.tasks import Prompt

    backbone = tiny.KINDS[kind]()
    recipe = Recipe(steps=150, lr=3e-3, eval_every=0, checkpoint_every=0, max_input=16, max_target=4)
    codec = Codec(backbone, recipe.max_input, recipe.max_target)
    training.make(tmp_path, recipe, backbone=backbone, delta="Full()").run()
    words = tiny.ADJECTIVES
    prompts = [Prompt(f"{word} very film good answer :", "") for word in words]
    rows = [[codec.row(prompt, word) for word in words] for prompt in prompts]
    chosen = choose(score_candidates(backbone, rows, 4, codec.pad))
    assert sum(chosen[index] == index for index in range(4)) >= 3
    losses = [line["loss"] for line in lines(tmp_path)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_steps_are_those_of_a_plain_loop(kind: str, tmp_path: Path) -> None:
    # AdamW takes full steps along gradients that are zero but for rounding, and large steps here grow what is rounded.
    recipe = dataclasses.replace(RECIPE, optimizer="sgd", lr=1e-3, eval_every=0, checkpoint_every=0)
    loop = training.make(tmp_path, recipe, backbone=tiny.KINDS[kind](), delta=EVERY)
    start = [p.detach().clone() for p in loop.parameters]
    loop.run()

    other = tiny.KINDS[kind]()
    (tmp_path / "plain").mkdir()
    plain = training.make(tmp_path / "plain", recipe, backbone=other, delta=EVERY)  # attached, and never run
    leaves, rate = plain.parameters, learning_rate(recipe)
    put(leaves, start)
    optimizer, losses = torch.optim.SGD(leaves, weight_decay=recipe.weight_decay, momentum=0.9), []
    other.model.eval()  # no dropout, as the recipe says
    for step, rows in zip(range(recipe.steps), plain.order(), strict=False):
        loss = other.model(**collate(rows, plain.pad)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, recipe.clip)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(losses, rel=1e-3)
    assert len(losses) == recipe.steps and losses[-1] != losses[0]


def test_every_step_is_logged_and_passed_on(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    progress = training.make(tmp_path, RECIPE, seen.append).run()
    assert seen == lines(tmp_path)
    steps = [line for line in seen if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 25))
    assert steps[0].keys() == {"step", "loss", "lr", "seconds", "tokens", "memory"}
    rate = learning_rate(RECIPE)
    assert [line["lr"] for line in steps] == [rate(step) for step in range(24)]
    assert sum(line["tokens"] for line in steps) == progress.tokens > 0
    assert all(line["memory"] > 1 << 20 and line["seconds"] > 0 for line in steps)
    assert progress.peak_memory >= max(line["memory"] for line in steps)


def test_only_the_given_parameters_change(tmp_path: Path) -> None:
    loop = training.make(tmp_path, RECIPE)
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    trained = {name for name, p in loop.model.named_parameters() if p.requires_grad}
    loop.run()
    changed = {name for name, value in loop.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and changed <= trained


def scripted(loop: Any, scores: list[float]) -> list[list[torch.Tensor]]:
    """Give the loop these dev scores, and keep the parameters it had at each."""
    kept: list[list[torch.Tensor]] = []
    following: Iterator[float] = iter(scores)

    def evaluate() -> float:
        kept.append([parameter.detach().clone() for parameter in loop.parameters])
        return next(following)

    loop.evaluate = evaluate
    return kept


def test_the_best_parameters_are_kept_and_of_equal_ones_the_earlier(tmp_path: Path) -> None:
    loop = training.make(tmp_path, RECIPE)
    kept = scripted(loop, [1.0, 3.0, 2.0, 3.0, 2.5])
    progress = loop.run()
    assert (progress.best_step, progress.dev, progress.step) == (10, 3.0, 24)
    assert all(torch.equal(parameter, value) for parameter, value in zip(loop.parameters, kept[1], strict=True))


def test_patience_stops_early(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, patience=2)
    loop = training.make(tmp_path, recipe)
    scripted(loop, [1.0, 3.0, 2.0, 3.0, 9.0])
    progress = loop.run()
    assert (progress.step, progress.best_step, progress.finished(recipe)) == (20, 10, "patience")
    again = training.make(tmp_path, recipe)
    assert again.run().step == 20, "a training that stopped early stays stopped"


def test_without_dev_evaluation_the_last_step_counts(tmp_path: Path) -> None:
    loop = training.make(tmp_path, dataclasses.replace(RECIPE, eval_every=0))
    progress = loop.run()
    assert (progress.best_step, progress.dev) == (24, None)
    assert [line for line in lines(tmp_path) if "dev" in line] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_infinite_loss_stops_and_says_what_to_try(precision: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, lr=1e38, optimizer="sgd", warmup=0.0, clip=0.0, precision=precision)
    loop = training.make(tmp_path, recipe)
    with pytest.raises(NonFiniteLoss) as caught:
        loop.run()
    message = str(caught.value)
    done = [line for line in lines(tmp_path) if "loss" in line]
    assert f"at step {len(done) + 1} (learning rate" in message
    assert all(f"{line['loss']:.4g}" in message for line in done[-5:])
    assert "Try lr=1e+37, a larger warmup" in message and "clip=1.0" in message
    assert ("precision='fp32'" in message) == (precision == "bf16")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_rises_and_ends_as_named(schedule: str) -> None:
    rate = learning_rate(Recipe(steps=100, lr=2.0, warmup=0.1, schedule=schedule))
    values = [rate(step) for step in range(101)]
    assert values[0] == 0 and values[10] == max(values) == 2.0 and values[:11] == sorted(values[:11])
    assert values[100] == pytest.approx(2.0 if schedule == "constant" else 0.0)


def test_the_peak_leaves_out_what_is_paused(tmp_path: Path) -> None:
    from deltatune.tuning.memory import Peak

    peak = Peak(torch.device("cpu"))
    with peak.paused():
        torch.ones(1 << 25).sum()
    outside = peak.note()
    torch.ones(1 << 25).sum()
    assert peak.note() > outside + (1 << 26)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    loop = training.make(tmp_path, dataclasses.replace(RECIPE, steps=4))
    loop.run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    process = get_context("fork").Process(target=_save_on_a_full_disk, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def _save_on_a_full_disk(folder: Path) -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    found = checkpoint.read_checkpoint(folder)
    assert found is not None
    scalars, state, best = found
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(DeltaTuneError, match=r"cannot write .*checkpoint-000008.safetensors: .*nothing was written"):
        checkpoint.write_checkpoint(folder, {**scalars, "step": 8}, state, best)
