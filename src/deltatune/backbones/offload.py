"""Backbones whose parameters accelerate keeps elsewhere and brings in for each call: where their modules compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltatune.core.stored import OFFLOADERS


def computes_on(module: nn.Module) -> torch.device | None:
    """Return the device that accelerate's hook brings a module's parameters to, or None when it offloads nothing."""
    hook: Any = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False) and each.execution_device is not None:
            return torch.device(each.execution_device)
    return None


OFFLOADERS.append(computes_on)
