"""What the networks that compute a soft prompt share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deltatune.core.leaf import KaimingUniform, Leaf, Uniform
from deltatune.core.method import Law
from deltatune.errors import DeltaTuneError
from deltatune.methods._maps import Map

IDENTITY: dict[Law, str] = {"identity": "the network's output is not the inner method's neutral start"}


def linear(i: int, d_in: int, d_out: int) -> dict[str, Leaf]:
    """Declare the weight and bias of the i-th linear layer, as torch starts them."""
    return {f"W{i}": Leaf((d_out, d_in), KaimingUniform()), f"b{i}": Leaf((d_out,), Uniform(d_in**-0.5))}


def embedding(p: Any) -> tuple[str, Tensor]:
    """Return the name of the leaf that is computed, and the states it is computed from."""
    return next((leaf[2:], tensor) for leaf, tensor in vars(p).items() if leaf.startswith("E_"))


def only(inner: dict[str, Leaf]) -> tuple[str, tuple[int, ...]]:
    """Return the name and the shape of a method's only leaf."""
    (name, leaf), *more = inner.items()
    if more or len(leaf.shape) != 2:
        shapes = {name: leaf.shape for name, leaf in inner.items()}
        raise DeltaTuneError(
            f"a prompt encoder makes one leaf of shape [length, d], as of PromptTuning; found {shapes}. MLP() makes several."
        )
    return name, leaf.shape


def check(encoder: Map, *sizes: int) -> None:
    """Raise `DeltaTuneError` for a size below 1."""
    if min(sizes) < 1:
        raise DeltaTuneError(f"{encoder} cannot be built; write sizes of at least 1.")
