"""Fastfood: a random projection that is never a dense matrix (Le et al., 2013, arXiv:1408.3060)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Normal, Shape

RADIX = 32  # of the factors: passes over memory cost more than the multiplications of so few numbers


@dataclass(frozen=True)
class Signs(Init):
    """+1 or -1, each with probability 1/2 (Rademacher)."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


@dataclass(frozen=True)
class Permutation(Init):
    """A random order of the indices 0 ... n - 1."""

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return torch.randperm(shape[0], generator=generator)


def hadamard(x: Tensor) -> Tensor:
    """Return H x along the last dimension [..., n], n a power of 2, H_ij = (-1)^(i . j), by factors of H that are small products."""
    n, done = x.shape[-1], 1
    factor = _sylvester(min(n, RADIX)).to(x)
    while done < n:  # each product takes the foremost digits of the index and leaves them behind the others
        size = min(RADIX, n // done)
        x = (x.unflatten(-1, (size, n // size)).mT @ factor[:size, :size]).flatten(-2)
        done *= size
    return x


def _sylvester(n: int) -> Tensor:
    """Return H [n, n] = H_2 x ... x H_2 (Kronecker); its first rows and columns are the smaller ones."""
    H = torch.ones(1, 1)
    while H.shape[0] < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def fastfood_leaves(size: int, dim: int) -> dict[str, Leaf]:
    """Declare the seeded leaves of a projection from `dim` to `size` numbers, in blocks of the next power of 2 above `dim`."""
    n = 1 << max(dim - 1, 0).bit_length()
    blocks = -(-size // n)
    return {
        "signs": Leaf((blocks, n), Signs(), trained=False),
        "order": Leaf((n,), Permutation(), trained=False),
        "gains": Leaf((blocks, n), Normal(1.0), trained=False),
    }


def fastfood(z: Tensor, signs: Tensor, order: Tensor, gains: Tensor, size: int) -> Tensor:
    """Return P z, of `size` numbers: H G Pi H B z in each block, scaled so that |P z| is |z| on average."""
    n = signs.shape[1]
    padded = torch.nn.functional.pad(z, (0, n - z.shape[0]))
    blocks = hadamard(hadamard(padded * signs).index_select(-1, order) * gains)
    return blocks.flatten()[:size] / (n * size**0.5 / n**0.5)
