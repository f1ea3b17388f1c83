"""Reparam: a method whose leaves are computed from others.

    p = through(q)        p: the leaves of the inner method   q: fewer leaves, or other ones, which are trained instead

`MLP` computes leaves of shape [length, c] from one matrix that all sites share (Li and Liang, 2021; P-tuning: Liu et al., 2021):

    leaf_i = tanh(E W^T + b) W_i^T + b_i        E: [length, size]   W: [hidden, size]   W_i: [c, hidden]

Parameters: length size + hidden size + hidden, and c (hidden + 1) for every leaf at every site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Init, KaimingUniform, Leaf, Normal, Zeros
from deltatune.core.method import Bag, Method
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._maps import Map


@dataclass(frozen=True)
class MLP(Map):
    """leaf_i = tanh(E W^T + b) W_i^T + b_i, with E, W and b shared by all sites (Li and Liang, 2021)."""

    size: int = 512
    hidden: int = 512
    init: Init = Normal(0.02)

    breaks = {"identity": "the network's output is not the inner method's neutral start"}  # noqa: RUF012

    def leaves(self, inner: dict[str, Leaf]) -> dict[str, Leaf]:
        lengths = {leaf.shape[0] for leaf in inner.values()}
        if len(lengths) != 1 or any(len(leaf.shape) != 2 for leaf in inner.values()):
            raise DeltaTuneError(
                f"an MLP makes leaves of shape [length, c] with one length; found {[leaf.shape for leaf in inner.values()]}."
            )
        shared = {
            "E": Leaf((lengths.pop(), self.size), self.init, scope="delta"),
            "W": Leaf((self.hidden, self.size), KaimingUniform(), scope="delta"),
            "b": Leaf((self.hidden,), Zeros(), scope="delta"),
        }
        out = {f"W_{name}": Leaf((leaf.shape[1], self.hidden), KaimingUniform()) for name, leaf in inner.items()}
        return {**shared, **out, **{f"b_{name}": Leaf((leaf.shape[1],)) for name, leaf in inner.items()}}

    def unfold(self, p: Any) -> dict[str, Tensor]:
        h, leaves = torch.tanh(F.linear(p.E, p.W, p.b)), vars(p)
        names = [name.removeprefix("W_") for name in leaves if name.startswith("W_")]
        return {name: F.linear(h, leaves[f"W_{name}"], leaves[f"b_{name}"]) for name in names}


@dataclass(frozen=True)
class Reparam(Method):
    """A method whose leaves are computed `through` a map from the leaves that are trained."""

    inner: Method
    through: Map = MLP()

    def __post_init__(self) -> None:
        kind = type(self.inner)
        if kind.draw is not Method.draw or kind.step is not Method.step:
            raise DeltaTuneError(
                f"{self.inner} moves leaves of its own while it is trained, which Reparam computes from others; "
                "train it as it is."
            )

    @property
    def where(self) -> str:  # type: ignore[override]
        """The inner method's default place."""
        return self.inner.where

    @property
    def acts(self) -> str:  # type: ignore[override]
        """The inner method's interface."""
        return self.inner.acts

    @property
    def kinds(self) -> Any:  # type: ignore[override]
        """The kinds of site that the inner method can act on."""
        return self.inner.kinds

    @property
    def breaks(self) -> Any:  # type: ignore[override]
        """The laws that the inner method or the map breaks."""
        return {**self.inner.breaks, **self.through.breaks}

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return self.through.leaves(self.inner.leaves(site))

    def takes(self, site: Site) -> bool:
        return self.inner.takes(site)

    @property
    def computes(self) -> Method:
        """The method that acts on what the map makes."""
        return self.inner.computes

    def unfold(self, p: Any) -> Any:
        return self.inner.unfold(Bag(self.through.unfold(p)))
