"""What the laws are checked on: every defined method, by itself, on every kind of backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.core.method import Method, registry
from tests import tiny

dt.LoRA  # noqa: B018  (defines the methods and the anatomies)

BACKBONES = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5, "plain": tiny.plain}
CAUSAL = ("llama", "gpt2")
GENERATING = ("llama", "gpt2", "t5")
PLAIN_PLACE = "path:blocks.*.{first,second}"


def examples() -> dict[str, Method]:
    """Return every method with its defaults (a length that fits tiny backbones), and through the default map where one fits."""
    simple = {}
    for label, method in registry().items():
        names = {f.name for f in fields(method)}  # type: ignore[arg-type]
        if "inner" not in names:
            simple[label] = method(length=5) if "length" in names else method()  # type: ignore[call-arg]
    mapped = {f"Reparam({n})": dt.Reparam(m) for n, m in simple.items() if m.acts in ("heads", "tokens")}
    return {**simple, **mapped}


METHODS = examples()


def fits(method: Method, backbone: str) -> bool:
    """Whether a method can act on a backbone: attention and prompts need one whose roles are known."""
    return backbone != "plain" or method.acts in ("linear", "stream", "tensor")


def cases(*backbones: str, keep: object = None) -> list[object]:
    """Return (method, backbone) for every method that fits, as pytest parameters."""
    return [
        pytest.param(method, name, id=f"{label}-{name}")
        for label, method in METHODS.items()
        for name in backbones or tuple(BACKBONES)
        if fits(method, name) and (keep is None or keep(method))  # type: ignore[operator]
    ]


def delta_of(method: Method, backbone: str) -> dt.Delta:
    """Return the method at its default place, or at the plain model's linears."""
    return method.at(PLAIN_PLACE if backbone == "plain" else method.where)


def busy(weights: dt.Weights, seed: int = 0, size: float = 0.05) -> dt.Weights:
    """Return the weights moved away from their start, so that no part of the method is neutral by accident."""
    generator = torch.Generator().manual_seed(seed)
    moved = {n: t + size * torch.randn(t.shape, generator=generator) for n, t in weights.tensors.items()}
    return replace(weights, tensors=moved)


def output(model: nn.Module, **changes: Tensor) -> Tensor:
    """Return the scores of the model's standard batch."""
    given = {**tiny.batch(model), **changes}
    y = model(**given)
    return y if isinstance(y, Tensor) else y.logits


def gradients(model: nn.Module) -> Iterator[Tensor | None]:
    """Yield the gradient of every parameter that is not a delta's."""
    return (p.grad for n, p in model.named_parameters() if not n.startswith("deltas."))
