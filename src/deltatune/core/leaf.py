"""Leaves: the tensors that a method declares at a site, and how they start."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Generator, Tensor

from deltatune.core.site import Site
from deltatune.core.spec import Spec

Shape = tuple[int, ...]
Held = Literal["trained", "stored", "seeded"]
T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """What an initialiser may look at: the site, its module's own tensors by name, and the evidence handed to `init`.

    All leaves of a method at one site are given the same one, so what they start from together is computed `once`.
    """

    site: Site
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return what `compute` gives, without computing it again for the site's next leaf; nothing random belongs here."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    @property
    def weight(self) -> Tensor:
        """The site's weight as a linear map, float32 [d_out, d_in], however the backbone stores it."""
        return self.oriented(self.tensors["weight"])

    @property
    def theta(self) -> Tensor:
        """The parameter of a site on tensors, as a float32 copy."""
        return self.tensors[self.site.tensor or "weight"].detach().to("cpu", torch.float32, copy=True)

    def oriented(self, stored: Tensor) -> Tensor:
        """Return what is shaped like the stored weight (a gradient, a mask) as float32 [d_out, d_in] of this site."""
        return self.site.matrix(stored.detach().to("cpu", torch.float32))

    def about(self, kind: str) -> Tensor:
        """Return the evidence of a kind on this site: by parameter path (`fisher`, `gradient`) or module path (`inputs`)."""
        name = ".".join(filter(None, [self.site.path, "" if kind == "inputs" else self.site.tensor or "weight"]))
        return self.evidence[kind][name]


class Init(Spec):
    """An initialiser: a pure function of a shape, a seeded generator and what is given."""

    needs: frozenset[str] = frozenset()

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        """Return a CPU tensor of `shape`: float32, or int64 for indices."""
        raise NotImplementedError


@dataclass(frozen=True)
class Zeros(Init):
    """0 everywhere: the usual start of the factor that makes a delta neutral."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.zeros(shape)


@dataclass(frozen=True)
class Constant(Init):
    """One value everywhere."""

    value: float = 1.0

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.full(shape, self.value)


@dataclass(frozen=True)
class Ones(Init):
    """1 everywhere: the usual start of a factor that rescales."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.ones(shape)


@dataclass(frozen=True)
class Normal(Init):
    """N(0, std^2), independent."""

    std: float = 0.02

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(self.std)


@dataclass(frozen=True)
class Uniform(Init):
    """U(-bound, bound), independent."""

    bound: float = 0.5

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.rand(shape, generator=generator).mul_(2).sub_(1).mul_(self.bound)


@dataclass(frozen=True)
class KaimingUniform(Init):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in the last dimension: torch's start of a linear layer (He et al., 2015)."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return Uniform(1 / math.sqrt(max(shape[-1], 1))).fill(shape, generator, given)


@dataclass(frozen=True)
class XavierUniform(Init):
    """U(-b, b) with b = gain sqrt(6 / (fan_in + fan_out)), the fans being the last two dimensions (Glorot and Bengio, 2010)."""

    gain: float = 1.0

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return Uniform(self.gain * math.sqrt(6 / (shape[-1] + shape[-2]))).fill(shape, generator, given)


@dataclass(frozen=True)
class Orthogonal(Init):
    """Orthonormal rows, or columns where there are more rows than columns (Saxe et al., 2014)."""

    gain: float = 1.0

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        tall = torch.randn((max(shape), min(shape)), generator=generator)
        Q, R = torch.linalg.qr(tall)
        Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
        return self.gain * (Q if shape[0] >= shape[1] else Q.T)


@dataclass(frozen=True)
class Copy(Init):
    """The site's own tensor, bit for bit (in float32)."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return given.theta


@dataclass(frozen=True)
class Leaf:
    """One declared tensor: its shape, its start, whether all sites of the delta share it, and how it is held.

    A leaf that is not `trained` is regenerated from the seed, unless it is `stored`: then it comes from the backbone or
    from evidence, and travels with the weights. `rate` is its learning rate as a multiple of the recipe's.
    """

    shape: Shape
    init: Init = field(default_factory=Zeros)
    scope: Literal["site", "delta"] = "site"
    trained: bool = True
    stored: bool = False
    rate: float = 1.0

    @property
    def kind(self) -> Held:
        """How it is held: trained, stored with the weights as it is, or regenerated from their seed."""
        return "trained" if self.trained else "stored" if self.stored else "seeded"
