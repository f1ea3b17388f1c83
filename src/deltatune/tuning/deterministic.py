"""The kernels that a training may use: on a CPU those that repeat bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from deltatune.core.products import products


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let torch use only kernels that repeat bit for bit, and fast products; on a GPU the former would cost speed."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(before[0] or device.type == "cpu", warn_only=True)
    # Filling every new tensor guards against reading it too early; nothing here does, and it costs a write each.
    settings.fill_uninitialized_memory = False
    try:
        with products(device):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filling
