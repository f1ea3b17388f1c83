"""Contents: what weights hold, term by term and site by site, as the names of their tensors tell it; no backbone is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deltatune.core.delta import Term
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError

SHARED = "*"  # the address of what all sites of a term share


@dataclass(frozen=True)
class Entry:
    """One tensor of a delta: the leaf's name, its shape and dtype, its size, and its Frobenius norm."""

    leaf: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    parameters: int
    nbytes: int
    norm: float

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a JSON object; a norm that is no number as None."""
        return {**vars(self), "shape": list(self.shape), "norm": self.norm if abs(self.norm) < float("inf") else None}


@dataclass(frozen=True)
class Held:
    """What one term of a delta holds: its entries by the address of their site, `*` for those that all sites share."""

    term: Term
    sites: dict[str, list[Entry]] = field(default_factory=dict)

    @property
    def entries(self) -> list[Entry]:
        """All entries of the term."""
        return [entry for entries in self.sites.values() for entry in entries]

    def to_json(self) -> dict[str, Any]:
        """Return the term as a JSON object."""
        sites = {address: [entry.to_json() for entry in entries] for address, entries in self.sites.items()}
        return {"where": self.term.where, "method": str(self.term.method), "sites": sites}


def contents(weights: Weights) -> list[Held]:
    """Return what each term of the delta holds; raises `DeltaTuneError` for a tensor that belongs to none."""
    held = [Held(term) for term in weights.delta.terms]
    for (term, address), leaves in by_site(weights).items():
        entries = [_entry(leaf, t, f"{term}.{address}.{leaf}" in weights.tensors) for leaf, t in leaves.items()]
        held[term].sites[address] = entries
    return held


def by_site(weights: Weights) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Return {(term, address): {leaf: tensor}}, in the order in which people count; raises `DeltaTuneError` as `contents` does."""
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    held = weights.held
    for name in sorted(held, key=natural):
        term, address, leaf = _split(name)
        if term >= len(weights.delta.terms):
            many = len(weights.delta.terms)
            raise DeltaTuneError(f"the tensor {name!r} belongs to term {term}, and {weights.delta} has {many}.")
        found.setdefault((term, address), {})[leaf] = held[name]
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts names as people count: layers.2 before layers.10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _split(name: str) -> tuple[int, str, str]:
    """Return the term, the address and the leaf of a tensor's name in weights, as `Placement.name` wrote it."""
    term, _, rest = name.partition(".")
    address, _, leaf = rest.rpartition(".")
    if not (term.isdecimal() and address and leaf):
        raise DeltaTuneError(f"the tensor {name!r} has no name of the form term.address.leaf.")
    return int(term), address, leaf


def _entry(leaf: str, tensor: Tensor, trained: bool) -> Entry:
    size, dtype = tensor.numel(), str(tensor.dtype).removeprefix("torch.")
    return Entry(
        leaf,
        tuple(tensor.shape),
        dtype,
        trained,
        size,
        size * tensor.element_size(),
        float(tensor.detach().double().norm()),
    )
