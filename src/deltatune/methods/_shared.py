"""Random matrices that all sites of one width share, and their start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape, Uniform


@dataclass(frozen=True)
class HeUniform(Init):
    """U(-b, b) with b = sqrt(6 / fan_in), fan_in the last dimension: variance 2 / fan_in (He et al., 2015)."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return Uniform(math.sqrt(6 / shape[-1])).fill(shape, generator, given)


def shared(name: str, shape: Shape, init: Init) -> dict[str, Leaf]:
    """Declare a random matrix that every site which needs this shape shares; the shape is in its name."""
    return {f"{name}_{'x'.join(map(str, shape))}": Leaf(shape, init, scope="delta", trained=False)}


def find(p: Any, name: str) -> Tensor:
    """Return the shared matrix called `name`, whatever its shape."""
    return next(tensor for leaf, tensor in vars(p).items() if leaf.startswith(f"{name}_"))
