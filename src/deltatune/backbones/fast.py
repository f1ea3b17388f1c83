"""What makes the loop of `tune` fast, for a loop of one's own: a lean backbone, and the products of `products`."""

from __future__ import annotations

from torch import nn

from deltatune.backbones.dense import attend_densely
from deltatune.backbones.lean import make_lean
from deltatune.core.attach import links
from deltatune.errors import DeltaTuneError


def lean(model: nn.Module) -> None:
    """Let a model, of transformers above all, compute the same in fewer operations, in place; its parameters stay the same tensors.

    Norms, composed activations and gated products are one operation each, and on a CPU attention goes by matrix products where
    that is faster. Raises `DeltaTuneError` where a delta is attached, whose places may be what is replaced.
    """
    from transformers import PreTrainedModel

    if links(model):
        raise DeltaTuneError(f"{', '.join(links(model))} is attached to the model; make it lean first, then attach.")
    make_lean(model)
    if isinstance(model, PreTrainedModel) and next(model.parameters()).device.type == "cpu":
        attend_densely(model)
