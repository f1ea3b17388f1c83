"""What the laws are checked on: every defined method, by itself, on every kind of backbone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.core.method import Method, registry
from deltatune.core.site import Site
from tests import tiny

dt.LoRA  # noqa: B018  (defines the methods and the anatomies)

BACKBONES = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5, "plain": tiny.plain}
BACKBONES["mixtral"] = tiny.mixtral  # for what acts on experts, and for nothing else
CAUSAL = ("llama", "gpt2")
GENERATING = ("llama", "gpt2", "t5")
# One method of each interface is checked on every backbone; the others each on two of them, chosen by their name.
EVERYWHERE = ("LoRA", "Adapter", "ParallelAdapter", "BitFit", "Full", "PrefixTuning", "PromptTuning")
# What defaults are made smaller to, so that they fit the tiny backbones.
SMALL = {
    "length": 5,
    "rank": 4,
    "dim": 40,
    "block": 8,
    "group": 8,
    "entries": 50,
}  # what defaults are made smaller to, so that they fit the tiny backbones


def examples() -> dict[str, Method]:
    """Return every method with its defaults, made small enough for tiny backbones, and one of every combinator."""
    simple = {n: _small(method) for n, method in registry().items() if all(_has_default(f) for f in fields(method))}
    return {**simple, **COMBINED}


def _has_default(field: Field) -> bool:
    return field.default is not MISSING


def _small(method: type[Method]) -> Method:
    default = method()
    return replace(
        default,
        **{n: min(size, vars(default)[n]) for n, size in SMALL.items() if isinstance(vars(default).get(n), int)},
    )  # type: ignore[type-var]


COMBINED: dict[str, Method] = {
    "Reparam(PrefixTuning)": dt.Reparam(dt.PrefixTuning(length=5)),
    "Reparam(PromptTuning)": dt.Reparam(dt.PromptTuning(length=5)),
    "Reparam(LoRA, Subspace)": dt.Reparam(dt.LoRA(rank=4), dt.Subspace(dim=20)),
    "Choose(LoRA)": dt.Choose(dt.LoRA(rank=4)),
    "Scale(LoRA)": dt.Scale(dt.LoRA(rank=4), by=0.5),
    "Gate(LoRA)": dt.Gate(dt.LoRA(rank=4)),
    "Gate(Adapter)": dt.Gate(dt.Adapter(size=8)),
    "Fuse(Adapters)": dt.Fuse((dt.Adapter(size=8), dt.Adapter(size=4)), size=8),
    "Fuse(LoRAs)": dt.Fuse((dt.LoRA(rank=4), dt.LoRA(rank=2)), size=8, frozen=True),
    "Mixture(LoRAs)": dt.Mixture((dt.LoRA(rank=4), dt.LoRA(rank=2)), top=1),
    "Arrow(LoRAs)": dt.Arrow((dt.LoRA(rank=4), dt.LoRA(rank=2)), top=1),
    "Average(LoRA, BitFit)": dt.Average((dt.LoRA(rank=4), dt.BitFit())),
    "Reparam(PromptTuning, LSTMEncoder)": dt.Reparam(dt.PromptTuning(length=5), dt.LSTMEncoder(hidden=8)),
    "AtPositions(LoReFT)": dt.AtPositions(dt.LoReFT(), first=4),
    "PerExpert(LoRA)": dt.PerExpert(dt.LoRA(rank=4)),
    "Stack(Adapters)": dt.Stack((dt.Adapter(size=8), dt.Adapter(size=4))),
}
METHODS = examples()


def fits(method: Method, backbone: str) -> bool:
    """Whether a method can act on a backbone: attention, prompts and ladders need one whose roles are known."""
    if backbone == "mixtral" or isinstance(method, dt.PerExpert):
        return backbone == "mixtral" and isinstance(method, dt.PerExpert)
    return backbone != "plain" or method.acts in ("linear", "stream", "branch", "tensor")


def cases(*backbones: str, keep: object = None, prefer: str = "") -> list[object]:
    """Return (method, backbone) for every method, on the backbones that it is checked on, as pytest parameters.

    A law that takes seconds to check may `prefer` one backbone for the methods that are not checked everywhere.
    """
    return [
        pytest.param(method, name, id=f"{label}-{name}")
        for label, method in METHODS.items()
        for name in _chosen(label, [b for b in backbones or tuple(BACKBONES) if fits(method, b)], prefer)
        if keep is None or keep(method)  # type: ignore[operator]
    ]


def _chosen(label: str, names: list[str], prefer: str) -> list[str]:
    if label in EVERYWHERE or not names:
        return names
    if prefer in names:
        return [prefer]
    start = zlib.crc32(label.encode())
    return sorted({names[(start + i) % len(names)] for i in range(1 if len(names) < 3 else 2)})


def fresh(delta: dt.Delta | Method, model: nn.Module, seed: int = 0) -> dt.Weights:
    """Return fresh weights, with the evidence that the delta needs measured on the model's standard batch, row by row."""
    given = tiny.batch(model)
    count = next(iter(given.values())).shape[0] if dt.needs(model, delta) else 0
    rows = [{name: tensor[i : i + 1] for name, tensor in given.items()} for i in range(count)]
    measured = dt.evidence(model, delta, rows, loss=_loss) if rows else {}
    return dt.init(delta, model, seed, evidence=measured)


def _loss(y: Any) -> Tensor:
    return (y if isinstance(y, Tensor) else y.logits).float().square().mean()


def plain_place(method: Method) -> str:
    """Return where a method goes in the plain model: its linears, or what it can act on instead."""
    probe = Site(role="path", path="", kind="linear", d_in=tiny.WIDTH, d_out=tiny.FFN, shape=(tiny.FFN, tiny.WIDTH))
    shared = "linear" in method.kinds and any(leaf.scope == "delta" for leaf in method.leaves(probe).values())
    linears = "path:blocks.*.first" if shared else PLAIN_PLACE  # what sites share has one width
    places = {"linear": linears, "norm": "path:blocks.*.scale", "embedding": "path:table"}
    return next(place for kind, place in places.items() if kind in method.kinds)


PLAIN_PLACE = "path:blocks.*.{first,second}"


def delta_of(method: Method, backbone: str) -> dt.Delta:
    """Return the method at its default place, or at the plain model's linears."""
    return method.at(plain_place(method) if backbone == "plain" else method.where)


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
