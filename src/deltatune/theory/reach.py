"""What a delta can reach: psi(delta), the changes of weights as a function of the delta's leaves, and its nearest point.

    psi: R^d' -> R^n        psi(delta) = theta(delta) - theta_0
    nearest(theta+) = argmin_delta |theta+ - theta_0 - psi(delta)|_2

Of LoRA the best rank-r part of each matrix (Eckart and Young, 1936), of a method whose change is affine in its leaves
(BitFit, a fixed mask, DID's Fastfood subspace, ...) a least-squares projection, J^T J x = J^T (theta+ - theta_0 - psi(start)).
Whether it is affine is tried out, not listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from deltatune.core.arithmetic import is_lora
from deltatune.core.delta import Delta, Placement, as_delta, place
from deltatune.core.method import Bag, Method
from deltatune.core.site import Site
from deltatune.core.stored import values
from deltatune.core.weights import Weights, completed, generate, init
from deltatune.errors import DeltaTuneError
from deltatune.theory.krylov import conjugate_gradients

Changes = Mapping[str, Tensor]  # float64, by the path of the parameter
Family = Delta | Method | Weights
AFFINE = 1e-8  # what rounding leaves of the second differences of an affine map, relative to the first


class Psi:
    """psi of some placements as a map from vectors x [d'] of the trained leaves, from their start on, in float64.

    Only what the placements of one module change is in memory at a time, and only the leaves of one placement that are
    drawn from the seed: J^T J is a sum over placements, which change no parameter in common.
    """

    def __init__(self, model: nn.Module, weights: Weights, placements: list[Placement], wanted: Changes) -> None:
        self.model, self.placements, self.wanted, self.seed = model, placements, wanted, weights.seed
        self.held = completed(model, weights, [_only(p, "delta") for p in placements])
        trained = {p.name(leaf) for p in placements for leaf, declared in p.leaves.items() if declared.trained}
        self.start = {name: _exact(tensor) for name, tensor in self.held.items() if name in trained}

    @property
    def size(self) -> int:
        """The number of leaves' values, d'."""
        return sum(t.numel() for t in self.start.values())

    def moved(self, x: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield the changes of the wanted parameters at start + x, by name, those of one module together."""
        leaves = self._leaves(x)
        for placements in by_module(self.placements):
            yield together(self._moved(placement, leaves) for placement in placements)

    def aim(self) -> Tensor:
        """Return J^T (wanted - psi(start)) [d'], J the derivative of psi."""
        return self._pulled(lambda name, at, placement: self.wanted[name] - at)

    def gram(self, x: Tensor) -> Tensor:
        """Return J^T J x [d']."""
        leaves = self._leaves(x)
        return self._pulled(lambda name, at, placement: self._moved(placement, leaves)[name] - at)

    def check(self, v: Tensor, owners: dict[str, int]) -> None:
        """Raise `DeltaTuneError` unless psi is affine along v [d'], both ways, and no parameter has an owner in another term."""
        start, *ways = [self._leaves(t * v) for t in (0.0, 1.0, 2.0, -1.0)]
        for placement in self.placements:
            at = self._moved(placement, start)
            step, twice, back = (
                {name: moved - at[name] for name, moved in self._moved(placement, leaves).items()} for leaves in ways
            )
            for name, once in step.items():
                size = float(once.norm())
                bent = float((twice[name] - 2 * once).norm() + (once + back[name]).norm())
                if bent > AFFINE * size:
                    raise DeltaTuneError(
                        f"{placement.method} is not linear in its leaves, so what it can reach is no subspace to project on. "
                        "Ask of LoRA (by its rank), or of a linear family: BitFit, FixedMask, DID, FourierFT."
                    )
                if size:
                    _own(owners, name, placement)

    def _pulled(self, of: Callable[[str, Tensor, Placement], Tensor]) -> Tensor:
        """Return J^T y, y the changes that `of` gives for a name, its change at the start, and the placement."""
        found = {name: torch.zeros_like(t) for name, t in self.start.items()}
        for placement in self.placements:
            names = [n for n in map(placement.name, placement.leaves) if n in found]
            own = {n: self.start[n].clone().requires_grad_() for n in names}
            with torch.enable_grad():
                moved = self._moved(placement, {**self.held, **own})
            pairs = {n: (d, of(n, d.detach(), placement)) for n, d in moved.items() if d.requires_grad}
            if pairs:
                outputs, y = zip(*pairs.values(), strict=True)
                grads = torch.autograd.grad(outputs, list(own.values()), y, materialize_grads=True)
                for name, grad in zip(own, grads, strict=True):
                    found[name] += grad
        return torch.cat([t.flatten() for t in found.values()])

    def _leaves(self, x: Tensor) -> dict[str, Tensor]:
        """Return all leaves that are held, the trained ones at start + x."""
        parts = x.split([t.numel() for t in self.start.values()])
        moved = {name: t + part.view(t.shape) for (name, t), part in zip(self.start.items(), parts, strict=True)}
        return {**self.held, **moved}

    def _moved(self, placement: Placement, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changes of the wanted parameters that one placement makes, in the graph of its leaves."""
        drawn = generate(self.model, [_only(placement, "site")], self.seed, "seeded", {})
        return {name: d for name, d in self._changes(placement, {**drawn, **held}).items() if name in self.wanted}

    def _changes(self, placement: Placement, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        site, method = placement.site, placement.method
        p = method.unfold(Bag({leaf: _exact(held[placement.name(leaf)]) for leaf in placement.leaves}))
        acting: Any = method.computes
        if acting.acts == "tensor":
            places = [(site.path, site.tensor or ""), *site.ties]
            names = {".".join(filter(None, at)): at for at in places}
            thetas = {name: self._theta(*at) for name, at in names.items() if name in self.wanted}
            return {name: acting.value(p, theta) - theta for name, theta in thetas.items()}
        found = {}
        if site.kind != "norm":
            stored = self._theta(site.path, "weight")
            W = site.matrix(stored)
            change = acting.weight(p, W) - W
            found[f"{site.path}.weight"] = site.stored(change, torch.zeros_like(stored))
        return found | self._bias(site, acting, p)

    def _bias(self, site: Site, acting: Any, p: Any) -> dict[str, Tensor]:
        name = f"{site.path}.bias"
        if not site.bias:
            new = acting.bias(p, None)
            return {} if new is None or site.part else {name: new}
        whole = self._theta(site.path, "bias")
        if site.part is None:
            return {name: acting.bias(p, whole) - whole}
        b = site.part.take(whole, 0)
        return {name: site.part.put(torch.zeros_like(whole), acting.bias(p, b) - b, 0)}

    def _theta(self, path: str, name: str) -> Tensor:
        module = self.model.get_submodule(path)
        theta: Any = module._parameters[name]
        return values(theta, module).detach().to("cpu", torch.float64)


def _exact(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


def _only(placement: Placement, scope: Literal["site", "delta"]) -> Placement:
    """Return a placement without its leaves of another scope."""
    return replace(placement, leaves={n: leaf for n, leaf in placement.leaves.items() if leaf.scope == scope})


def by_module(placements: Iterable[Placement]) -> Iterator[list[Placement]]:
    """Yield the placements of one module after another."""
    ordered = sorted(placements, key=lambda p: p.site.path)
    return (list(own) for _, own in groupby(ordered, key=lambda p: p.site.path))


def together(changes: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return changes added up by name: the roles that share a stored weight have a part of it each."""
    found: dict[str, Tensor] = {}
    for own in changes:
        for name, change in own.items():
            found[name] = found[name] + change if name in found else change
    return found


@torch.no_grad()
def nearest_changes(
    model: nn.Module, family: Family, wanted: Changes, seed: int = 0, evidence: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield the change nearest to `wanted` that a family can reach, module by module, each parameter once.

    A family is a delta, or weights of one, whose leaves that are not trained (a mask, a subspace) are then those meant. What
    it does not reach is left out. Raises `DeltaTuneError` for a method that changes no weights, for one that is neither a
    LoRA nor affine in its leaves, and for two terms that change the same parameter.
    """
    placements = place(model, delta_of(family))
    _check(placements)
    owners: dict[str, int] = {}
    plain, rest = [[p for p in placements if _is_plain_lora(p) is way] for way in (True, False)]
    for placement in plain:
        _own(owners, f"{placement.site.path}.weight", placement)
    if rest:
        weights = family if isinstance(family, Weights) else init(family, model, seed, evidence)
        psi = Psi(model, weights, rest, wanted)
        psi.check(torch.randn(psi.size, generator=Generator().manual_seed(seed), dtype=torch.float64), owners)
        yield from psi.moved(conjugate_gradients(psi.gram, psi.aim()))
    for own in by_module(plain):
        yield together(_best(placement, wanted) for placement in own)


def nearest_change(
    model: nn.Module, family: Family, wanted: Changes, seed: int = 0, evidence: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Return what `nearest_changes` yields in one piece: zero where the family reaches nothing."""
    found = {name: torch.zeros_like(change) for name, change in wanted.items()}
    for near in nearest_changes(model, family, wanted, seed, evidence):
        found |= near
    return found


def delta_of(family: Family) -> Delta:
    """Return the delta of a family."""
    return family.delta if isinstance(family, Weights) else as_delta(family)


def _is_plain_lora(placement: Placement) -> bool:
    alone = placement.method.computes is placement.method
    return alone and is_lora(placement.method) and all(leaf.trained for leaf in placement.leaves.values())


def _best(placement: Placement, wanted: Changes) -> dict[str, Tensor]:
    """Return the best rank-r part of the change of a stored weight, if it is wanted."""
    site, rank, name = placement.site, placement.leaves["A"].shape[0], f"{placement.site.path}.weight"
    if name not in wanted:
        return {}
    U, S, Vt = torch.linalg.svd(site.matrix(wanted[name]), full_matrices=False)
    return {name: site.stored((U[:, :rank] * S[:rank]) @ Vt[:rank], torch.zeros_like(wanted[name]))}


def _own(owners: dict[str, int], name: str, placement: Placement) -> None:
    if owners.setdefault(name, placement.term) != placement.term:
        raise DeltaTuneError(f"two terms of the delta change {name!r}; ask of one family at a time.")


def _check(placements: list[Placement]) -> None:
    for placement in placements:
        if "merge" in placement.method.breaks:
            raise DeltaTuneError(
                f"{placement.method} changes no weight ({placement.method.breaks['merge']}), so weights have no residual outside "
                "it: ask `theory.function_gap.compare_answers` of it, or take LoRA, BitFit, FixedMask or DID."
            )
