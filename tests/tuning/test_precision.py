"""Precision: what a run holds in it, and that it ends about where one in fp32 does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltatune as dt
from deltatune.backbones import dense
from deltatune.core.stored import quantised
from deltatune.tuning import Recipe, Run, evaluate, tune
from deltatune.tuning.precision import KEPT, load_for
from deltatune.tuning.run import Session
from tests.tuning import training

RECIPE = Recipe(steps=60, lr=3e-2, eval_every=20, checkpoint_every=0, max_input=24, max_target=4)
DELTAS = ["LoRA(rank=4)", "LNTuning()", "LastLayers(1)", "Full()"]
LOW = ["bf16", "int8"]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    kinds = {kind: training.write_backbone(folder / kind, kind) for kind in ("causal", "seq2seq")}
    return {"task": training.write_task(folder / "tasks"), **kinds}


def run(names: dict[str, str], kind: str, delta: str, precision: str) -> Run:
    lr = 5e-3 if delta in ("Full()", "LastLayers(1)") else RECIPE.lr
    return Run(delta, names[kind], names["task"], dataclasses.replace(RECIPE, precision=precision, lr=lr), seed=1)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
@pytest.mark.parametrize("delta", DELTAS)
def test_training_in_bf16_learns_what_fp32_does(names: dict[str, str], kind: str, delta: str, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        result = tune(run(names, kind, delta, precision), tmp_path / precision)
        found[precision] = (losses(tmp_path / precision), result["dev"])
    (exact, best), (rough, dev) = found["fp32"], found["bf16"]
    assert rough[0] == pytest.approx(exact[0], rel=0.03), "the first loss differs by rounding alone"
    gained = exact[0] - sum(exact[-10:]) / 10
    assert sum(rough[-10:]) / 10 == pytest.approx(sum(exact[-10:]) / 10, abs=0.1 * gained)
    assert best - dev <= 12.5, "two of sixteen examples fewer"


@pytest.mark.parametrize("precision", LOW)
def test_the_backbone_is_held_in_it_and_what_is_trained_is_not(
    names: dict[str, str], precision: str, tmp_path: Path
) -> None:
    if precision == "int8":
        pytest.importorskip("torchao")
    one = run(names, "causal", "LoRA(rank=4)", precision)
    session = Session(one, tmp_path, Session.load(one))
    loop: Any = session.loop(None)
    own = {n: p for n, p in loop.model.named_parameters() if not n.startswith("deltas.")}
    assert {p.dtype for p in own.values()} == {torch.bfloat16}
    blocks = [m.weight for n, m in loop.model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    assert all(quantised(weight) == (precision == "int8") for weight in blocks)
    loop.run()
    assert {p.dtype for p in loop.parameters} == {torch.float32}
    held = [v for slots in loop.optimizer.state.values() for v in slots.values() if isinstance(v, torch.Tensor)]
    assert held and {v.dtype for v in held} == {torch.float32}
    assert not any(p.requires_grad or p.grad is not None for p in own.values())


@pytest.mark.parametrize("precision", LOW)
def test_what_was_tuned_in_it_is_used_in_it_and_fits_the_backbone_in_fp32(
    names: dict[str, str], precision: str, tmp_path: Path
) -> None:
    if precision == "int8":
        pytest.importorskip("torchao")
    one = run(names, "seq2seq", "LoRA(rank=4)", precision)
    result = tune(one, tmp_path)
    assert evaluate(None, None, tmp_path)["score"] == result["test"]
    model = load_for(one.backbone, "fp32").model
    attached = dt.attach(model, dt.Weights.read(tmp_path), check=precision == "bf16")
    assert {t.dtype for t in dt.merge(model, attached, check=False).values()} == {torch.float32}


def test_a_cpu_attends_densely_and_keeps_few_compiled_products(
    names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    for variable in KEPT:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    exact: Any = load_for(names["causal"], "fp32").model
    assert exact.config._attn_implementation == dense.NAME
    rough: Any = load_for(names["causal"], "bf16").model
    assert rough.config._attn_implementation == dense.NAME
    assert {variable: os.environ[variable] for variable in KEPT} == {**KEPT, "LRU_CACHE_CAPACITY": "7"}
