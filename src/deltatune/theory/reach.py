"""What a delta can reach: psi(delta), the changes of weights as a function of the delta's leaves, and its nearest point.

    psi: R^d' -> R^n        psi(delta) = theta(delta) - theta_0
    nearest(theta+) = argmin_delta |theta+ - theta_0 - psi(delta)|_2

Of LoRA the best rank-r part of each matrix (Eckart and Young, 1936), of a method whose change is affine in its leaves
(BitFit, a fixed mask, DID's Fastfood subspace, ...) a least-squares projection, J^T J x = J^T (theta+ - theta_0 - psi(start)).
Whether it is affine is tried out, not listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from deltatune.core.arithmetic import is_lora
from deltatune.core.delta import Delta, Placement, as_delta, place
from deltatune.core.method import Bag, Method
from deltatune.core.site import Site
from deltatune.core.stored import values
from deltatune.core.weights import Weights, completed, init
from deltatune.errors import DeltaTuneError
from deltatune.theory.krylov import conjugate_gradients

Changes = Mapping[str, Tensor]  # float64, by the path of the parameter
Family = Delta | Method | Weights
AFFINE = 1e-8  # what rounding leaves of the second differences of an affine map, relative to the first


class Psi:
    """psi of some placements as a map from vectors x [d'] of the trained leaves, from their start on, in float64.

    Only what one placement changes is in memory at a time: J^T J is a sum over placements, which change no parameter
    in common.
    """

    def __init__(self, model: nn.Module, weights: Weights, placements: list[Placement], wanted: Changes) -> None:
        self.model, self.placements, self.wanted = model, placements, wanted
        self.held = completed(model, weights, place(model, weights.delta))
        trained = {p.name(leaf) for p in placements for leaf, declared in p.leaves.items() if declared.trained}
        self.start = {name: _exact(tensor) for name, tensor in self.held.items() if name in trained}

    @property
    def size(self) -> int:
        """The number of leaves' values, d'."""
        return sum(t.numel() for t in self.start.values())

    def moved(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the change of each wanted parameter, by name, at start + x."""
        leaves = self._leaves(x)
        for placement in self.placements:
            yield from self._moved(placement, leaves).items()

    def aim(self) -> Tensor:
        """Return J^T (wanted - psi(start)) [d'], J the derivative of psi."""
        return self._pulled(lambda name, at, placement: self.wanted[name] - at)

    def gram(self, x: Tensor) -> Tensor:
        """Return J^T J x [d']."""
        leaves = self._leaves(x)
        return self._pulled(lambda name, at, placement: self._moved(placement, leaves)[name] - at)

    def check(self, v: Tensor, owners: dict[str, int]) -> None:
        """Raise `DeltaTuneError` unless psi is affine along v [d'], both ways, and no parameter has an owner in another term."""
        ways = [self._leaves(t * v) for t in (0.0, 1.0, 2.0, -1.0)]
        for placement in self.placements:
            zero, once, twice, back = (self._moved(placement, leaves) for leaves in ways)
            for name, at in zero.items():
                step = float((once[name] - at).norm())
                bent = float((twice[name] - 2 * once[name] + at).norm() + (once[name] + back[name] - 2 * at).norm())
                if bent > AFFINE * step:
                    raise DeltaTuneError(
                        f"{placement.method} is not linear in its leaves, so what it can reach is no subspace to project on. "
                        "Ask of LoRA (by its rank), or of a linear family: BitFit, FixedMask, DID, FourierFT."
                    )
                if step:
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
        """Return all leaves, the trained ones at start + x."""
        parts = x.split([t.numel() for t in self.start.values()])
        moved = {name: t + part.view(t.shape) for (name, t), part in zip(self.start.items(), parts, strict=True)}
        return {**self.held, **moved}

    def _moved(self, placement: Placement, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the changes of the wanted parameters that one placement makes, in the graph of its leaves."""
        return {name: d for name, d in self._changes(placement, held).items() if name in self.wanted}

    def _changes(self, placement: Placement, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        site, method = placement.site, placement.method
        p = method.unfold(Bag({leaf: _exact(held[placement.name(leaf)]) for leaf in placement.leaves}))
        acting: Any = method.computes
        if acting.acts == "tensor":
            places = [(site.path, site.tensor or ""), *site.ties]
            thetas = {".".join(filter(None, at)): self._theta(*at) for at in places}
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


@torch.no_grad()
def nearest_change(
    model: nn.Module, family: Family, wanted: Changes, seed: int = 0, evidence: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Return the change nearest to `wanted` that a family can reach, for the parameters of `wanted`.

    A family is a delta, or weights of one, whose leaves that are not trained (a mask, a subspace) are then those meant.
    Raises `DeltaTuneError` for a method that changes no weights, for one that is neither a LoRA nor affine in its leaves,
    and for two terms that change the same parameter.
    """
    placements = place(model, delta_of(family))
    _check(placements)
    found = {name: torch.zeros_like(change) for name, change in wanted.items()}
    owners: dict[str, int] = {}
    for placement in filter(_is_plain_lora, placements):
        name = f"{placement.site.path}.weight"
        _own(owners, name, placement)
        if name in wanted:
            found[name] += _best(placement, wanted[name])
    rest = [p for p in placements if not _is_plain_lora(p)]
    if rest:
        weights = family if isinstance(family, Weights) else init(family, model, seed, evidence)
        psi = Psi(model, weights, rest, wanted)
        psi.check(torch.randn(psi.size, generator=Generator().manual_seed(seed), dtype=torch.float64), owners)
        for name, change in psi.moved(conjugate_gradients(psi.gram, psi.aim())):
            found[name] += change
    return found


def delta_of(family: Family) -> Delta:
    """Return the delta of a family."""
    return family.delta if isinstance(family, Weights) else as_delta(family)


def _is_plain_lora(placement: Placement) -> bool:
    alone = placement.method.computes is placement.method
    return alone and is_lora(placement.method) and all(leaf.trained for leaf in placement.leaves.values())


def _best(placement: Placement, change: Tensor) -> Tensor:
    """Return the best rank-r part of a stored weight's change."""
    site, rank = placement.site, placement.leaves["A"].shape[0]
    U, S, Vt = torch.linalg.svd(site.matrix(change), full_matrices=False)
    return site.stored((U[:, :rank] * S[:rank]) @ Vt[:rank], torch.zeros_like(change))


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
