"""What a delta can reach: psi(delta), the changes of weights as a function of the delta's leaves, and its nearest point.

    psi: R^d' -> R^n        psi(delta) = theta(delta) - theta_0
    nearest(theta+) = argmin_delta |theta+ - theta_0 - psi(delta)|_2

Of LoRA the best rank-r part of each matrix (Eckart and Young, 1936), of a method whose change is affine in its leaves
(BitFit, a fixed mask, DID's Fastfood subspace, ...) a least-squares projection, which needs psi and its adjoint only.
Whether it is affine is tried out, not listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from deltatune.core.arithmetic import is_lora
from deltatune.core.delta import Delta, Placement, place
from deltatune.core.method import Bag
from deltatune.core.site import Site
from deltatune.core.stored import values
from deltatune.core.weights import completed, init
from deltatune.errors import DeltaTuneError
from deltatune.theory.krylov import least_squares

Changes = Mapping[str, Tensor]  # float64, by the path of the parameter
AFFINE = 1e-8  # what rounding leaves of the second differences of an affine map, relative to the first


class Reach:
    """psi of some placements, as a map of vectors: leaves [d'] to changes [n] of the parameters `names`, all in float64."""

    def __init__(
        self, model: nn.Module, delta: Delta, placements: list[Placement], wanted: Changes, seed: int, evidence: Any
    ) -> None:
        self.model, self.placements = model, placements
        self.shapes = {name: change.shape for name, change in wanted.items()}
        everywhere = place(model, delta)
        held = completed(model, init(delta, model, seed, evidence), everywhere)
        self.held = {n: t.double() if t.is_floating_point() else t for n, t in held.items()}
        trained = {p.name(leaf) for p in placements for leaf, declared in p.leaves.items() if declared.trained}
        self.start = {name: self.held[name] for name in held if name in trained}
        self.origin = self.pack(self.psi(self.start))

    @property
    def size(self) -> int:
        """The number of leaves' values, d'."""
        return sum(t.numel() for t in self.start.values())

    def forward(self, x: Tensor) -> Tensor:
        """Return psi(start + x) - psi(start), [n]."""
        return self.pack(self.psi(self.leaves(x))) - self.origin

    def adjoint(self, y: Tensor) -> Tensor:
        """Return J^T y [d'], J the derivative of psi, one placement at a time."""
        wanted = self.unpack(y)
        found = {name: torch.zeros_like(t) for name, t in self.start.items()}
        for placement in self.placements:
            own = {
                n: self.start[n].clone().requires_grad_() for n in map(placement.name, placement.leaves) if n in found
            }
            with torch.enable_grad():
                moved = self._moved(placement, {**self.held, **own})
                pairs = [(d * wanted[name]).sum() for name, d in moved.items() if name in wanted and d.requires_grad]
                if not pairs:
                    continue
                grads = torch.autograd.grad(torch.stack(pairs).sum(), list(own.values()), materialize_grads=True)
            for name, grad in zip(own, grads, strict=True):
                found[name] += grad
        return torch.cat([t.flatten() for t in found.values()])

    def leaves(self, x: Tensor) -> dict[str, Tensor]:
        """Return the leaves at start + x."""
        parts = x.split([t.numel() for t in self.start.values()])
        return {name: t + part.view(t.shape) for (name, t), part in zip(self.start.items(), parts, strict=True)}

    @torch.no_grad()
    def psi(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the change of every parameter."""
        held = {**self.held, **leaves}
        found: dict[str, Tensor] = {}
        for placement in self.placements:
            for name, change in self._moved(placement, held).items():
                found[name] = found[name] + change if name in found else change
        return found

    def pack(self, changed: Changes) -> Tensor:
        """Return the changes of the parameters that are looked at as one vector [n]."""
        zero = torch.zeros((), dtype=torch.float64)
        parts = [changed.get(name, zero).expand(shape).flatten() for name, shape in self.shapes.items()]
        return torch.cat(parts)

    def unpack(self, y: Tensor) -> dict[str, Tensor]:
        """Return a vector [n] as changes."""
        parts = y.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def _moved(self, placement: Placement, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what one placement changes, in the graph of its leaves."""
        site, method = placement.site, placement.method
        p = method.unfold(Bag({leaf: held[placement.name(leaf)] for leaf in placement.leaves}))
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


def nearest_change(
    model: nn.Module, delta: Delta, wanted: Changes, seed: int = 0, evidence: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Return the change nearest to `wanted` that `delta` can reach, for the parameters of `wanted`.

    Raises `DeltaTuneError` for a method that changes no weights, that is neither a LoRA nor affine in its leaves, and for
    two terms that change the same parameter.
    """
    placements = place(model, delta)
    _check(placements)
    low = [p for p in placements if _is_plain_lora(p)]
    found = {name: torch.zeros_like(change) for name, change in wanted.items()}
    for placement in low:
        name = f"{placement.site.path}.weight"
        if name in wanted:
            found[name] += _best(placement, wanted[name])
    rest = [p for p in placements if not _is_plain_lora(p)]
    for name, change in (_projected(model, delta, rest, wanted, seed, evidence) if rest else {}).items():
        found[name] += change
    return found


def _is_plain_lora(placement: Placement) -> bool:
    alone = placement.method.computes is placement.method
    return alone and is_lora(placement.method) and all(leaf.trained for leaf in placement.leaves.values())


def _best(placement: Placement, change: Tensor) -> Tensor:
    """Return the best rank-r part of a stored weight's change."""
    site, rank = placement.site, placement.leaves["A"].shape[0]
    U, S, Vt = torch.linalg.svd(site.matrix(change), full_matrices=False)
    return site.stored((U[:, :rank] * S[:rank]) @ Vt[:rank], torch.zeros_like(change))


def _projected(
    model: nn.Module, delta: Delta, placements: list[Placement], wanted: Changes, seed: int, evidence: Any
) -> dict[str, Tensor]:
    reach = Reach(model, delta, placements, wanted, seed, evidence)
    v = torch.randn(reach.size, generator=Generator().manual_seed(seed), dtype=torch.float64)
    once, twice, back = reach.forward(v), reach.forward(2 * v), reach.forward(-v)
    if max(float((twice - 2 * once).norm()), float((once + back).norm())) > AFFINE * float(once.norm()):
        raise DeltaTuneError(
            f"{placements[0].method} is not linear in its leaves, so what it can reach is no subspace to project on. Ask of "
            "LoRA (by its rank), or of a linear family: BitFit, FixedMask, DID, FourierFT."
        )
    target = reach.pack(wanted) - reach.origin
    x = least_squares(reach.forward, reach.adjoint, target)
    return reach.unpack(reach.origin + reach.forward(x))


def _check(placements: list[Placement]) -> None:
    owners: dict[str, int] = {}
    for placement in placements:
        if "merge" in placement.method.breaks:
            raise DeltaTuneError(
                f"{placement.method} changes no weight ({placement.method.breaks['merge']}), so weights have no residual outside "
                "it: ask `function_gap` of it, or take LoRA, BitFit, FixedMask or DID."
            )
        name = f"{placement.site.path}.{placement.site.tensor or 'weight'}"
        if owners.setdefault(name, placement.term) != placement.term:
            raise DeltaTuneError(f"two terms of the delta change {name!r}; ask of one family at a time.")
