"""Invertible adapter: the embedding is mapped to another space, and back before the head (Pfeiffer et al., 2020, arXiv:2005.00052).

    o1 = e1 + F(e2), o2 = e2 + G(o1)       behind the embedding, e = [e1; e2]
    e2 = o2 - G(o1), e1 = o1 - F(e2)       before the head,      o = [o1; o2]
    F(z) = relu(z F1^T + f1) F2^T + f2     F1: [c, d2]   F2: [d1, c]   (G alike), d1 + d2 = d, c = half of the input

Both places share their tensors, and the second undoes the first (NICE: Dinh et al., 2015). F1 and G1 start N(0, 0.02^2),
F2 and G2 at zero, so the delta starts neutral. Parameters: d^2 / 2 + 3 d / 2 once, for an even d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Given, Init, Leaf, Normal, Shape, Zeros
from deltatune.core.method import OnStream
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class Turn(Init):
    """The signs of the three couplings F, G, F: (1, 1, 0) there at an output, (0, -1, -1) back at an input."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.tensor([0.0, -1.0, -1.0] if given.site.side == "in" else [1.0, 1.0, 0.0])


@dataclass(frozen=True)
class InvertibleAdapter(OnStream):
    """NICE coupling behind the embedding, and its inverse before the head (MAD-X: Pfeiffer et al., 2020)."""

    down: Init = Normal(0.02)
    up: Init = Zeros()

    where = "{embed:out,head:in?}"

    def leaves(self, site: Site) -> dict[str, Leaf]:
        if site.width < 4:
            raise DeltaTuneError(f"InvertibleAdapter halves a width twice; {site.path!r} has {site.width}, it needs 4.")
        one, two = site.width // 2, site.width - site.width // 2
        nets = {**self._net("F", two, one), **self._net("G", one, two)}
        return {**nets, "turn": Leaf((3,), Turn(), trained=False)}

    def _net(self, name: str, d_in: int, d_out: int) -> dict[str, Leaf]:
        c = d_in // 2
        shapes = {"1": ((c, d_in), self.down), "2": ((d_out, c), self.up)}
        matrices = {f"{name}{i}": Leaf(shape, init, scope="delta") for i, (shape, init) in shapes.items()}
        biases = {f"{name.lower()}{i}": Leaf(shape[:1], scope="delta") for i, (shape, _) in shapes.items()}
        return {**matrices, **biases}

    def stream(self, p: Any, h: Tensor) -> Tensor:
        one, two = h.split([p.F2.shape[0], p.G2.shape[0]], -1)
        one = one + p.turn[0] * _net(two, p.F1, p.f1, p.F2, p.f2)
        two = two + p.turn[1] * _net(one, p.G1, p.g1, p.G2, p.g2)
        one = one + p.turn[2] * _net(two, p.F1, p.f1, p.F2, p.f2)
        return torch.cat([one, two], -1)


def _net(z: Tensor, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(z, W1, b1)), W2, b2)
