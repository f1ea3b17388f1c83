"""Subspace: a method's leaves as points of a low-dimensional space (Qin et al., 2021, arXiv:2110.07867; Yi et al., 2022, arXiv:2210.13311).

    leaf_i = b_i + W_i z        z: [dim], one for the whole delta        W_i: [shape of leaf_i, dim]

`Reparam(PromptTuning(), through=Subspace(dim=5))` is intrinsic prompt tuning in a random subspace: W is drawn from the seed
and b is the method's own start. With `basis=Found()` it is the second phase of the paper: W and b come from the weights of many
tasks, `init(..., evidence={"subspace": subspace(weights, dim)})`, whose best linear decoder is their principal components.
`unified_subspace` finds one z space for adapters, LoRA and prefixes. Parameters: dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Normal, Shape
from deltatune.core.spec import Spec
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.methods._maps import Map


class Basis(Spec):
    """Where a subspace comes from."""

    def leaves(self, name: str, inner: Leaf, dim: int) -> dict[str, Leaf]:
        """Declare W and b of one leaf."""
        raise NotImplementedError


@dataclass(frozen=True)
class Random(Basis):
    """W ~ N(0, 1/dim) from the seed, b the leaf's own start (the random-subspace baseline of Qin et al., 2021)."""

    def leaves(self, name: str, inner: Leaf, dim: int) -> dict[str, Leaf]:
        W = Leaf((*inner.shape, dim), Normal(dim**-0.5), inner.scope, trained=False)
        start = Leaf(inner.shape, inner.init, inner.scope, trained=False, stored=bool(inner.init.needs))
        return {f"W_{name}": W, f"b_{name}": start}


@dataclass(frozen=True)
class Found(Basis):
    """W and b from the evidence `subspace`, which `subspace(weights, dim)` computes; stored with the weights."""

    def leaves(self, name: str, inner: Leaf, dim: int) -> dict[str, Leaf]:
        return {
            f"{sign}_{name}": Leaf(shape, Of(name, sign), inner.scope, trained=False, stored=True)
            for sign, shape in (("W", (*inner.shape, dim)), ("b", inner.shape))
        }


@dataclass(frozen=True)
class Of(Init):
    """One tensor of the evidence `subspace`."""

    leaf: str
    sign: str

    needs = frozenset({"subspace"})

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        name = f"{given.site.address}.{self.leaf}"
        if name not in given.evidence["subspace"]:
            raise DeltaTuneError(f"the subspace was found without {name!r}; find it with weights of this delta.")
        return given.evidence["subspace"][name][0 if self.sign == "W" else 1]


@dataclass(frozen=True)
class Subspace(Map):
    """leaf = b + W z (Qin et al., 2021)."""

    dim: int = 250
    basis: Basis = Random()

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise DeltaTuneError(f"Subspace(dim={self.dim}) has no dimension; write at least 1.")

    def leaves(self, inner: dict[str, Leaf]) -> dict[str, Leaf]:
        fixed = [self.basis.leaves(name, leaf, self.dim) for name, leaf in inner.items() if leaf.trained]
        rest = {f"keep_{name}": leaf for name, leaf in inner.items() if not leaf.trained}
        return {"z": Leaf((self.dim,), scope="delta"), **{n: x for d in fixed for n, x in d.items()}, **rest}

    def unfold(self, p: Any) -> dict[str, Tensor]:
        leaves = vars(p)
        moved = {n[2:]: leaves[f"b_{n[2:]}"] + leaves[n] @ p.z for n in leaves if n.startswith("W_")}
        return {**moved, **{n[5:]: tensor for n, tensor in leaves.items() if n.startswith("keep_")}}


Evidence = dict[str, tuple[Tensor, Tensor]]


def subspace(weights: Sequence[Weights], dim: int) -> Evidence:
    """Return {address.leaf: (W, b)} of the `dim`-dimensional affine space nearest to the weights of several tasks.

    Raises `DeltaTuneError` unless there are more than `dim` weights, all of one delta.
    """
    return unified_subspace([weights], dim)[0]


def unified_subspace(families: Sequence[Sequence[Weights]], dim: int) -> list[Evidence]:
    """Return one subspace for each family of weights (adapters, LoRA, prefixes, ...) whose coordinates z mean the same in all.

    Each family has weights of one delta for the same tasks in the same order and counts alike, whatever its size; a z found
    with one delta serves another (Yi et al., 2022). Raises `DeltaTuneError` unless there are more than `dim` tasks in each.
    """
    counts = {len(weights) for weights in families}
    if len(counts) != 1 or min(counts) <= dim or any(len({w.delta for w in weights}) != 1 for weights in families):
        raise DeltaTuneError(
            f"a subspace of {dim} dimensions needs more than {dim} weights of one delta, and as many of every family; "
            f"found {', '.join(str(len(weights)) for weights in families)}."
        )
    points = [torch.stack([torch.cat([t.float().flatten() for t in w.tensors.values()]) for w in f]) for f in families]
    means = [each.mean(0) for each in points]
    sizes = [(each - mean).norm().clamp(min=1e-12) for each, mean in zip(points, means, strict=True)]
    joined = torch.cat([(each - mean) / size for each, mean, size in zip(points, means, sizes, strict=True)], 1)
    _, S, V = torch.linalg.svd(joined, full_matrices=False)
    W = (V[:dim] * S[:dim, None] / len(joined) ** 0.5).T  # z of unit variance spans what the tasks spanned
    parts = W.split([mean.numel() for mean in means])
    return [_split(f[0], mean, part * size) for f, mean, part, size in zip(families, means, parts, sizes, strict=True)]


def _split(weights: Weights, mean: Tensor, W: Tensor) -> Evidence:
    found, start = {}, 0
    for name, tensor in weights.tensors.items():
        end = start + tensor.numel()
        shape = (*tensor.shape, W.shape[1])
        found[name.partition(".")[2]] = (W[start:end].reshape(shape), mean[start:end].view(tensor.shape))
        start = end
    return found
