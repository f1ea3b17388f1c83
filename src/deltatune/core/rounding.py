"""Rounding: what is lost of a change when merged values are cast to the backbone's dtype.

    error = |cast(W') - W - Delta| / |Delta|        Delta = W' - W in float64, Frobenius norms

A change far smaller than the weight that it is added to is lost in 8 bits of mantissa, however well it was trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deltatune.core.convert import TOLERANCE, Report, changes
from deltatune.core.weights import Weights


@torch.no_grad()
def rounding(
    model: nn.Module, weights: Weights, merged: Mapping[str, Tensor], tolerance: float = TOLERANCE, check: bool = True
) -> Report:
    """Return the error of every parameter that `merge` gave for `weights`; the model holds the values before it."""
    exact, errors = changes(model, weights, check), {}
    for name, new in merged.items():
        owner, _, leaf = name.rpartition(".")
        before = model.get_submodule(owner)._parameters.get(leaf)
        made = new.detach().to("cpu", torch.float64)
        if before is not None:
            made = made - before.detach().to("cpu", torch.float64)
        off, size = float((made - exact[name]).norm()), float(exact[name].norm())
        errors[name] = off / size if size else (0.0 if off == 0 else float("inf"))
    return Report(errors, tolerance)
