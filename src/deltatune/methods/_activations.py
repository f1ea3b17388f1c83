"""The activations between the two matrices of a bottleneck, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from deltatune.errors import DeltaTuneError, nearest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "tanh": F.tanh,
    "leaky_relu": F.leaky_relu,
    "identity": lambda h: h,
}


def check_activation(name: str) -> None:
    """Raise `DeltaTuneError` for a name that is not known."""
    if name not in ACTIVATIONS:
        raise DeltaTuneError(
            f"there is no activation {name!r}.{nearest(name, ACTIVATIONS)} Known: {', '.join(ACTIVATIONS)}."
        )
