"""PerExpert: a method on linear layers, for every expert of a layer whose weights are one 3-D parameter (no paper; mixtures of
experts: Shazeer et al., 2017, arXiv:1701.06538).

    W'[e] = m_e(W[e])        W: [experts, d_out, d_in], or [experts, d_in, d_out] with transposed=True

A leaf of m becomes one tensor with an expert dimension in front, in which every expert starts by itself; what m shares over
all its sites, all experts share too. `only` names the parameter, where a place holds others as well: transformers stores
`gate_up_proj` and `down_proj`, and gpt-oss theirs transposed, beside biases. Parameters: experts times those of m.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Bag, Method, OnTensor
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._experts import SHARED, OfExperts, gathered, one_expert, split, with_gradients


@dataclass(frozen=True)
class PerExpert(OnTensor):
    """Every expert by itself: W'[e] = inner_e(W[e]) for the 3-D weights of a mixture of experts."""

    inner: Method
    only: str = ""
    transposed: bool = False

    where = "path:**.experts"
    kinds = ("container",)

    def __post_init__(self) -> None:
        if self.inner.acts != "linear":
            raise DeltaTuneError(
                f"PerExpert makes new weights; {self.inner} is no method on linear layers, as LoRA() is."
            )
        if "merge" in self.inner.breaks:
            raise DeltaTuneError(
                f"PerExpert makes new weights, and {self.inner} has none: {self.inner.breaks['merge']}."
            )

    @property
    def breaks(self) -> Any:  # type: ignore[override]
        """The laws that the inner method breaks."""
        return self.inner.breaks

    def takes(self, site: Site) -> bool:
        return self.only in ("", site.tensor)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        name = f"{site.path}.{site.tensor}"
        if len(site.shape) != 3:
            raise DeltaTuneError(
                f"PerExpert acts on parameters [experts, d_out, d_in]; {name!r} is {list(site.shape)}. Write "
                'only="..." with the name of a 3-D parameter, or put the inner method at the linear layers themselves.'
            )
        leaves = self.inner.leaves(one_expert(site, self.transposed))
        for leaf in leaves.values():
            if "inputs" in leaf.init.needs:
                raise DeltaTuneError(
                    f"{self.inner} starts from a layer's inputs, which are not known for one expert of {name!r}."
                )
        hollow = Bag({leaf: torch.empty(d.shape, device="meta") for leaf, d in leaves.items()})
        if self.inner.computes.bias(self.inner.unfold(hollow), None) is not None:  # type: ignore[attr-defined]
            raise DeltaTuneError(
                f"{self.inner} changes a bias, and {name!r} has none; give PerExpert a method on weights alone."
            )
        mine: dict[str, Leaf] = {}
        for leaf, d in leaves.items():
            shared = d.scope == "delta"
            shape = d.shape if shared else (site.shape[0], *d.shape)
            init = OfExperts(d.init, shared, self.transposed)
            mine[SHARED + leaf if shared else leaf] = replace(d, shape=shape, init=init)
        return mine

    def value(self, p: Any, theta: Tensor) -> Tensor:
        def one(leaves: dict[str, Tensor], stored: Tensor) -> Tensor:
            W = stored.mT if self.transposed else stored
            new = self.inner.computes.weight(self.inner.unfold(Bag(leaves)), W)  # type: ignore[attr-defined]
            return new.mT if self.transposed else new

        leaves = {name.removeprefix(SHARED): tensor for name, tensor in vars(p).items()}
        axes = {name.removeprefix(SHARED): None if name.startswith(SHARED) else 0 for name in vars(p)}
        return torch.func.vmap(one, in_dims=(axes, 0))(leaves, theta)

    def penalty(self, p: Any) -> Tensor | None:
        terms = [self.inner.computes.penalty(self.inner.unfold(one)) for one in split(p)]
        some = [term for term in terms if term is not None]
        return torch.stack(some).sum() if some else None

    def draw(self, p: Any, generator: Generator) -> dict[str, Tensor]:
        return gathered(p, [self.inner.draw(one, generator) for one in split(p)])

    def step(self, sites: list[Any], step: int, steps: int) -> list[dict[str, Tensor]] | None:
        experts = [with_gradients(p, split(p)) for p in sites]
        moved = self.inner.step([one for own in experts for one in own], step, steps)
        if moved is None:
            return None
        rest = iter(moved)
        return [gathered(p, [next(rest) for _ in own]) for p, own in zip(sites, experts, strict=True)]
