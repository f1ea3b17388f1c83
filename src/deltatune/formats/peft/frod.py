"""FROD: a basis and places for each role of a module stand at the root of the file, the diagonal and entries at the modules.

peft has W' = U (diag(L) + S) V^T, U = W V^-T / L_0 with columns of length 1. It takes U from the basis that it computes of
the backbone before it loads the file's, so a file with another basis would be another function there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.core.method import Bag
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.form import Form, agree
from deltatune.formats.seats import Seat, weight_of
from deltatune.methods._joint import RIDGE, inverse, joint
from deltatune.methods._shared import find
from deltatune.methods.reparameterization.frod import FRoD

BASIS, PLACES, SIZE = "frod_V", "frod_s_indices", "frod_s_size"


class FRoDForm(Form):
    """l and the rows of S are in units of L_0 here."""

    type = "FROD"
    methods = (FRoD,)
    transposed = True
    shared = (BASIS, PLACES, SIZE)
    suffixes = needed = ("frod_lambda_l", "frod_lambda_s_values")
    fields = frozenset(
        [
            "projection_prng_key",
            "save_projection",
            "frod_dropout",
            "sparse_rate",
            "regularization_alpha",
            "progressbar",
            "runtime_offload_base_weight",
        ]
    )

    def spread(self, config: Config, held: Mapping[str, Tensors], shared: Tensors) -> dict[str, Tensors]:
        bases: list[Tensors] = []
        found = {}
        for path, own in held.items():
            basis = _basis(config, shared, _role(path))
            same = [known for known in bases if all(torch.equal(known[name], basis[name]) for name in basis)]
            if not same:
                bases.append(basis | {"R": _inverse(config, basis[BASIS]), "group": torch.tensor(len(bases))})
            found[path] = own | (same or bases[-1:])[0]
        return found

    def read_at(self, config: Config, site: Site, held: Tensors, own: Tensors) -> list[Part]:
        V, R, (rows, columns), d = held[BASIS], held["R"], held[PLACES], site.d_in
        agree(config, "the width of its basis", site.path, len(V), d)
        if not 0 <= held[PLACES].min() <= held[PLACES].max() < d:
            raise DeltaTuneError(f"{PLACES} of {site.path!r} has places outside a matrix of {d} x {d}.")
        L, faint = _lengths(weight_of(site, own), R)
        diagonal, entries = held["frod_lambda_l"], held["frod_lambda_s_values"]
        if any((found.abs() > 1e-4 * L.max()).any() for found in (diagonal[faint], entries[faint[rows]])):
            raise DeltaTuneError(
                f"the weight of {site.path!r} has next to nothing in {int(faint.sum())} directions of its basis, and peft makes "
                "columns of length 1 of the rounding errors there, which nothing else can repeat. Merge it in peft."
            )
        leaves = {
            "l": torch.where(faint, 1, diagonal / L),
            "S": torch.where(faint[rows], 0, entries / L[rows]),
            f"V_{d}x{d}": V,
            f"R_{d}x{d}": R,
            f"j_{d}": rows * d + columns,
        }
        method = FRoD(config.number("sparse_rate", 0.01))
        return [Part(site.path, method, leaves, group=str(int(held["group"])))]

    def write(self, seat: Seat) -> Tensors:
        _, R, places = _fixed(seat)
        L, _ = _lengths(seat.W, R)
        return {"frod_lambda_l": seat.leaves["l"] * L, "frod_lambda_s_values": seat.leaves["S"] * L[places[0]]}

    def share(self, seats: Sequence[Seat]) -> Tensors:
        tensors: Tensors = {}
        for role in dict.fromkeys(_role(seat.site.path) for seat in seats):
            own = [seat for seat in seats if _role(seat.site.path) == role]
            V, _, places = _fixed(own[0])
            if not all(torch.equal(V, _fixed(seat)[0]) and torch.equal(places, _fixed(seat)[2]) for seat in own):
                raise DeltaTuneError(f"peft's FROD has one basis and one S for all {role}; this delta has several.")
            layers = {_layer(seat.site.path): seat.W for seat in own}
            theirs, _ = joint([layers[layer] for layer in sorted(layers)])
            if theirs.shape != V.shape or not torch.allclose(theirs, V, rtol=0, atol=1e-3 * float(V.abs().max())):
                raise DeltaTuneError(
                    f"peft takes U = W V^-T of {role} from the joint basis V that it computes of these modules, and this delta "
                    "has another V. Write one term for each role, or merge it."
                )
            size = torch.tensor([len(V), len(V)])
            tensors |= {f"{BASIS}.{role}": V, f"{PLACES}.{role}": places, f"{SIZE}.{role}": size}
        return tensors

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        share = self.only("share", (seat.method.share for seat in seats))
        return {"sparse_rate": share, "regularization_alpha": RIDGE, "save_projection": True, "projection_prng_key": 0}


def _basis(config: Config, shared: Tensors, role: str) -> Tensors:
    if f"{BASIS}.{role}" not in shared or f"{PLACES}.{role}" not in shared:
        raise DeltaTuneError(
            f"the file beside {config.source} lacks {BASIS}.{role} or {PLACES}.{role}: it was saved with save_projection=False, "
            "and a basis that is computed again may have other signs. Save it with save_projection=True."
        )
    return {BASIS: shared[f"{BASIS}.{role}"], PLACES: shared[f"{PLACES}.{role}"]}


def _fixed(seat: Seat) -> tuple[Tensor, Tensor, Tensor]:
    """Return a site's V, R and the rows and columns of S."""
    p, d = Bag(seat.leaves), seat.site.d_in
    V, places = find(p, "V"), find(p, "j")
    return V, find(p, "R"), torch.stack([places // d, places % d])


def _inverse(config: Config, V: Tensor) -> Tensor:
    R = inverse(V)
    if R is None:
        raise DeltaTuneError(
            f"a basis in the file beside {config.source} has no inverse in single precision, so it does not tell peft's U."
        )
    return R


def _lengths(W: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Return L_0, the lengths of the columns of W R, and which of them are lost in single precision."""
    exact = W.double() @ R.double()
    L = exact.norm(dim=0)
    return L.float(), (W @ R - exact).norm(dim=0) >= 1e-3 * L


def _role(path: str) -> str:
    """Return the name under which peft shares a basis: the last two parts of a path, a number left out."""
    *before, parent, name = ("", "", *path.split("."))
    if parent.isdigit() or not parent:
        return name
    at_attention = (parent, name) == ("output", "dense") and before[-1] == "attention"
    return "attention_output" if at_attention else f"{parent}_{name}"


def _layer(path: str) -> int:
    """Return the number of a module's block as peft finds it: behind `layers`, or the first number of its path."""
    parts = path.split(".")
    behind = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in [*behind, *parts] if part.isdigit()), 0)
