"""Precision: how a frozen backbone is held and computes. What is trained stays float32, and is cast where it meets it.

| precision | frozen weights                            | computes in | trained leaves, optimizer, loss |
|-----------|-------------------------------------------|-------------|---------------------------------|
| fp32      | float32                                   | float32     | float32                         |
| bf16      | bfloat16                                  | bfloat16    | float32                         |
| int8      | linears in 8 bits, all others in bfloat16 | bfloat16    | float32                         |
"""

from __future__ import annotations

import os

import torch
from torch import nn

from deltatune.backbones import Backbone, load
from deltatune.backbones.fast import lean
from deltatune.tuning import heap

HELD: dict[str, tuple[str, str | None]] = {  # how `load` is asked for it: a float type, and a quantisation
    "fp32": ("float32", None),
    "bf16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
}
# On a CPU oneDNN compiles a product for every shape, half a megabyte each, and keeps 1024 of them, twice. This
# many are enough for the shapes of a run. The libraries read it before their first product, and what a user set holds.
CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
KEPT = {CAPACITY: "128", "LRU_CACHE_CAPACITY": "1"}


def load_for(name: str, precision: str) -> Backbone:
    """Return a backbone, held as `precision` says, on the device that computes and ready to answer."""
    dtype, quantise = HELD[precision]
    backbone = load(name, dtype, quantise)
    backbone.model.to(device()).eval()
    if device().type == "cpu":
        heap.keep()
        keep_few_kernels()
    hold_in(backbone.model, precision)
    return backbone


def keep_few_kernels() -> None:
    """Bound what the libraries keep of compiled products, unless a user has."""
    for variable, value in KEPT.items():
        os.environ.setdefault(variable, value)


def kernels_kept() -> int:
    """Return how many compiled products are kept."""
    return int(os.environ.get(CAPACITY, KEPT[CAPACITY]))


def computes_in(precision: str) -> torch.dtype:
    """Return the float type that a backbone held as `precision` says computes in."""
    return getattr(torch, HELD[precision][0])


def hold_in(model: nn.Module, precision: str) -> None:
    """Let a model that is loaded, or planned, compute as `precision` says; numbers in 8 bits are planned as bfloat16."""
    lean(model)
    if dtype := cast_to(model, precision):
        model.to(dtype)


def cast_to(model: nn.Module, precision: str) -> torch.dtype | None:
    """Return the float type that a model has yet to be cast to, as one in float32 has."""
    dtype = computes_in(precision)
    return dtype if dtype != torch.float32 and all(p.dtype == torch.float32 for p in model.parameters()) else None


def device() -> torch.device:
    """Return the device that accelerate chooses."""
    from accelerate import PartialState

    return PartialState().device or torch.device("cpu")
