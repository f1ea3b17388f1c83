"""Other libraries themselves, each in a process of its own in `.venv-others`: they compute what deltatune wrote, and it what they wrote."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deltatune as dt
from tests import tiny
from tests.formats.small import scores
from tests.laws.cases import busy

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-others" / "bin" / "python"
needs_others = pytest.mark.skipif(
    not PYTHON.exists(), reason="needs the other libraries in .venv-others: run `make .venv-others/.ready`"
)
Kinds = Mapping[str, tuple[Sequence[str], str]]  # by name, the families and the delta
Read = Callable[[nn.Module, Path], dt.Weights]


def build(name: str) -> nn.Module:
    """Return the tiny backbone with which a name begins."""
    return tiny.FAMILIES[name.partition("-")[0]]()


def save_backbone(model: nn.Module, folder: Path) -> None:
    """Save a model so that transformers 4 computes the same of it: of mT5, where 4 alone scales what a tied head reads, untied."""
    if model.config.model_type == "mt5":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)


def moved(model: nn.Module, text: str) -> dt.Weights:
    """Return weights moved away from their start."""
    return busy(dt.init(dt.parse(text), model), size=0.2)


def exchange(
    library: str,
    folder: Path,
    kinds: Kinds,
    write: Callable[[nn.Module, dt.Weights, Path], None],
    read: Read,
    weights_of: Callable[[nn.Module, str], dt.Weights] = moved,
) -> dict[str, float]:
    """Return by name how far the scores of a library and ours are from each other, for what we write and for what it writes."""
    ours = {}
    for name in sorted({family for families, _ in kinds.values() for family in families}):
        save_backbone(build(name), folder / "backbones" / name)
    for kind, (families, text) in kinds.items():
        for name in (f"{family}-{kind}" for family in families):
            ours[name] = weights_of(build(name), text)
            write(build(name), ours[name], folder / "ours" / name)
    _run(library, folder)
    theirs = {path.name: read(build(path.name), path) for path in sorted((folder / "theirs").iterdir())}
    assert theirs
    made = {"ours": ours, "theirs": theirs}
    return {f"{way}/{n}": gap(build(n), w, folder / way / n) for way, own in made.items() for n, w in own.items()}


def _run(library: str, folder: Path) -> None:
    command = [str(PYTHON), "-m", f"tests.formats.peers.{library}", str(folder)]
    offline = {"HF_HUB_OFFLINE": "1", "DELTACENTER_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | offline, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]


@torch.no_grad()
def gap(model: nn.Module, weights: dt.Weights, folder: Path) -> float:
    """Return how far our scores are from the library's, in units of the largest one where that is above one."""
    expected, given = load_file(folder / "scores.safetensors")["scores"], tiny.batch(model)
    assert (scores(model, given) - expected).abs().max() > 1e-2, folder
    with dt.attach(model, weights):
        return float((scores(model, given) - expected).abs().max() / expected.abs().max().clamp(min=1))


def assert_same(gaps: Mapping[str, float]) -> None:
    """Assert that scores are the same to 1e-5."""
    assert {name: far for name, far in gaps.items() if not far <= 1e-5} == {}
