"""What the memory ledger predicts, and what training then takes.

A prediction is made without running the model; then a process of its own trains a few steps, and its peak is read from the
system. Compared is growth: the bytes above what the process holds before its first step, backbone, delta and libraries
included. The whole is that and what was held. The Llama has 4 blocks (d=768, ffn=2048, batch 4 x 128), BERT 6 (d=512, ffn=2048,
batch 8 x 128), t5-seed is read from DELTATUNE_MODELS (batch 16 x 128, answers of 16 tokens).

Each is measured twice. Where the heap gives freed memory back, as `deltatune tune --memory-budget` has it, the peak is what
training needs, and the ledger's error is its own. Where it is kept for the next step, as `tune` has it otherwise, freed tensors lie in
pieces that often fit no other, to an extent that differs from one start of the same process to the next; what that takes stands
beside. A time is the sum of the prices of a step's operations against the median step of that process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import deltatune as dt
from benchmarks.benchmark import Benchmark, Result, Table
from benchmarks.plots import Bars, Plot
from benchmarks.shape import Shape, llama
from deltatune.tuning.deterministic import deterministic
from deltatune.tuning.forecast import resident
from deltatune.tuning.heap import give_back, keep
from deltatune.tuning.ledger import Shape as Batch
from deltatune.tuning.ledger import batch_of, ledger
from deltatune.tuning.loss import make_loss
from deltatune.tuning.memory import Peak
from deltatune.tuning.optim import make_optimizer
from deltatune.tuning.precision import hold_in, keep_few_kernels
from deltatune.tuning.prices import prices
from deltatune.tuning.recipe import Recipe

METHODS = {
    "LoRA": 'LoRA(rank=8).at("{attn.{q,k,v,o},ffn.{gate?,up,down}}")',
    "Adapter": "Adapter()",
    "PrefixTuning": "PrefixTuning()",
    "IA3": "IA3()",
    "BitFit": "BitFit()",
    "Full": "Full()",
}
LLAMA, BERT, SEED, SMALL = "Llama", "BERT", "t5-seed", "tiny Llama"
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Trials(Shape):
    """Which backbones and methods, and how many steps a process trains; `rounds` is how often each is measured."""

    backbones: tuple[str, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    steps: int = 5


def model_of(backbone: str) -> nn.Module:
    """Build a backbone; t5-seed is read from DELTATUNE_MODELS."""
    if backbone == SEED:
        return dt.load_backbone(SEED).model
    if backbone == BERT:
        from transformers import BertConfig, BertForMaskedLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048}
        return BertForMaskedLM(BertConfig(vocab_size=8192, **sizes))
    return llama(2, 64, 96, 2) if backbone == SMALL else llama(4, 768, 2048, 12)


def batch(backbone: str) -> Batch:
    """Return the batch that is trained on: full rows, so that there is no padding."""
    rows, length = {SEED: (16, 128), BERT: (8, 128), LLAMA: (4, 128), SMALL: (2, 16)}[backbone]
    return Batch(rows, length, answer=length, padded=False)


def train(backbone: str, method: str, steps: int, back: bool) -> Result:
    """Train in this process; return the bytes held before the first step, the peak, and the median seconds of a step."""
    keep_few_kernels()
    model, recipe, device = model_of(backbone).train(), Recipe(), torch.device("cpu")
    hold_in(model, recipe.precision)
    given = batch_of(model, batch(backbone), device)
    attachment = dt.attach(model, dt.parse(METHODS[method]))
    parameters = list(attachment.parameters())
    optimizer = make_optimizer(recipe, parameters)
    give_back() if back else keep()
    held, peak, seconds = resident(device), Peak(device), []
    loss = make_loss(model, {name: tensor[:2] for name, tensor in given.items()})
    with deterministic(device):
        for _ in range(steps):
            start = time.process_time()
            loss(given).backward()
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - start)
    return {"held": held, "peak": peak.note(), "seconds": statistics.median(seconds)}


def in_a_process(backbone: str, method: str, steps: int, back: bool) -> Result:
    """Train where nothing else has used memory."""
    asked = json.dumps([backbone, method, steps, back])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.ledger", asked]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{method} on {backbone}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: Trials) -> Result:
    """Predict and measure; rows with `growth` and `peak` in bytes, planned and measured, and `usual` where the heap keeps what is freed."""
    rows, priced = [], prices(torch.device("cpu"))
    for backbone in shape.backbones:
        model = model_of(backbone)
        for method in shape.methods:
            planned = ledger(
                model, dt.parse(METHODS[method]), batch(backbone), Recipe(dropout=True), price=priced.seconds
            )
            found = [in_a_process(backbone, method, shape.steps, True) for _ in range(shape.rounds)]
            usual = [in_a_process(backbone, method, shape.steps, False) for _ in range(shape.rounds)]
            rows.append(row(backbone, method, planned.to_json(), found, usual))
    return {"trials": rows}


def row(backbone: str, method: str, planned: dict[str, Any], found: list[Result], usual: list[Result]) -> Result:
    """Return one row of the result."""
    growth = statistics.median(one["peak"] - one["held"] for one in found)
    held = statistics.median(one["held"] for one in found)
    return {
        "backbone": backbone,
        "method": method,
        "planned": planned["growth"],
        "growth": growth,
        "error": planned["growth"] / growth - 1,
        "error_of_peak": (held + planned["growth"]) / (held + growth) - 1,
        "usual": [one["peak"] - one["held"] for one in usual],
        "planned_seconds": planned["seconds"],
        "seconds": statistics.median(one["seconds"] for one in usual),
        "ledger": planned,
    }


def tables(result: Result) -> list[Table]:
    """Return what was planned beside what was measured."""
    rows = [
        (
            f"{r['method']} on {r['backbone']}",
            f"{r['planned'] / MIB:.1f} MiB",
            f"{r['growth'] / MIB:.1f} MiB",
            f"{r['error']:+.1%}",
            f"{r['error_of_peak']:+.1%}",
            f"{max(r['usual']) / MIB:.1f} MiB",
            f"{r['planned_seconds'] / r['seconds'] - 1:+.0%}",
        )
        for r in result["trials"]
    ]
    columns = ("", "planned", "measured", "error", "of the whole", "heap kept", "of the time")
    return [Table("Growth of the process in training, planned and measured", columns, rows)]


def plots(result: Result) -> list[Plot]:
    """Return the errors."""
    errors = {f"{r['method']} on {r['backbone']}": 100 * abs(r["error"]) for r in result["trials"]}
    return [Bars("Error of the planned growth", errors, " %")]


BENCHMARK = Benchmark(
    full=Trials(rounds=1, backbones=(LLAMA, BERT, SEED)),
    quick=Trials(rounds=1, backbones=(SMALL,), methods=("LoRA",), steps=2),
    measure=measure,
    tables=tables,
    plots=plots,
)

if __name__ == "__main__":
    print(json.dumps(train(*json.loads(sys.argv[1]))))
