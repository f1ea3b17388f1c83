"""Leaves: the tensors that a method declares at a site, and how they start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from deltatune.core.spec import Spec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Given:
    """What an initialiser may look at: the site's own tensors by name, and the evidence handed to `init`."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)


class Init(Spec):
    """An initialiser: a pure function of a shape, a seeded generator and what is given."""

    needs: frozenset[str] = frozenset()

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        """Return a float32 CPU tensor of `shape`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Zeros(Init):
    """0 everywhere: the usual start of the factor that makes a delta neutral."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.zeros(shape)


@dataclass(frozen=True)
class Normal(Init):
    """N(0, std^2), independent."""

    std: float = 0.02

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.randn(shape, generator=generator) * self.std


@dataclass(frozen=True)
class Uniform(Init):
    """U(-bound, bound), independent."""

    bound: float = 0.5

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * self.bound


@dataclass(frozen=True)
class KaimingUniform(Init):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in the last dimension: torch's start of a linear layer (He et al., 2015)."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return Uniform(1 / math.sqrt(max(shape[-1], 1))).fill(shape, generator, given)


@dataclass(frozen=True)
class Copy(Init):
    """The site's own tensor, bit for bit (in float32)."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return given.tensors["theta"].detach().to("cpu", torch.float32, copy=True)


@dataclass(frozen=True)
class Leaf:
    """One declared tensor: its shape, its start, whether all sites of the delta share it, and whether it is trained."""

    shape: Shape
    init: Init = field(default_factory=Zeros)
    scope: Literal["site", "delta"] = "site"
    trained: bool = True
