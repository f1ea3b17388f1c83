"""Lean backbones: activations that transformers composes of many operations, as the one kernel that computes the same.

    gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

Composed, a gradient through it keeps five tensors of the width of the feed-forward layer; the kernel keeps x.
"""

from __future__ import annotations

from torch import nn


def make_lean(model: nn.Module) -> None:
    """Replace composed activations of a transformers model, in place."""
    from transformers.activations import NewGELUActivation

    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is NewGELUActivation
    ]
    for module, name in found:
        setattr(module, name, nn.GELU(approximate="tanh"))
