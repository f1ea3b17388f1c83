"""ADAMSS: which rows form a group is not in the file; peft finds it in the backbone when it loads the file, and so does this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.form import Form, agree
from deltatune.formats.seats import Seat
from deltatune.methods._kmeans import SEED
from deltatune.methods._subspaces import subspaces
from deltatune.methods.reparameterization.adamss import AdaMSS

BASIS = "adamss_newB"
A, B = "adamss_A", "adamss_B"
GROUPS = 64  # as many as keys are looked for


class AdaMSSForm(Form):
    """A group's factors are tensors of their own, B one of its rows; a group of fewer rows than the rank has a smaller rank."""

    type = "ADAMSS"
    methods = (AdaMSS,)
    needed = (BASIS, f"{A}.0", f"{B}.0")
    suffixes = (BASIS, *(f"{side}.{i}" for side in (A, B) for i in range(GROUPS)))
    fields = frozenset(
        [
            "r",
            "num_subspaces",
            "subspace_rank",
            "use_dynamic_rank",
            "svd_threshold",
            "random_seed",
            "use_asa",
            "asa_target_subspaces",
            "asa_importance_beta",
            "asa_uncertainty_beta",
            "asa_schedule_exponent",
            "init_warmup",
            "final_warmup",
            "mask_interval",
        ]
    )

    def seed(self, config: Config) -> int:
        return config.whole("random_seed", 0)

    def read_at(self, config: Config, site: Site, held: Tensors, own: Tensors) -> list[Part]:
        method = AdaMSS(config.whole("r", 100), config.whole("num_subspaces", 5), config.whole("subspace_rank", 1))
        groups, rank, size = method.leaves(site)["A"].shape
        V = held[BASIS]
        agree(config, "r", site.path, len(V), size)
        agree(config, "num_subspaces", site.path, sum(name.startswith(A) for name in held), groups)
        g = _groups(site, own, V, groups, self.seed(config))
        counts, rows = g.bincount(minlength=groups).tolist(), [len(held[f"{B}.{i}"]) for i in range(groups)]
        if counts != rows:
            raise DeltaTuneError(
                f"the groups of {site.path!r} have {rows} rows in the file, but {counts} in this model, where peft would find "
                "them again; was it trained on this model? Merge it in peft where it was trained."
            )
        factors = torch.zeros(site.d_out, rank)
        for i in range(groups):
            factors[g == i] = _wide(held[f"{B}.{i}"], rows[i], rank)
        leaves = {
            "A": torch.stack([_wide(held[f"{A}.{i}"], rank, size) for i in range(groups)]),
            "B": factors,
            "V": V[:, : site.d_in],
            "c": V[:, site.d_in] if site.bias else torch.zeros(size),
            "g": g,
        }
        return [Part(site.path, method, leaves)]

    def write(self, seat: Seat) -> Tensors:
        p, V = seat.leaves, seat.leaves["V"]
        tensors = {BASIS: torch.cat([V, p["c"][:, None]], 1) if seat.site.bias else V}
        for i, factor in enumerate(p["A"]):
            tensors |= {f"{A}.{i}": factor, f"{B}.{i}": p["B"][p["g"] == i]}
        return tensors

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        sizes = {"r": method.size, "num_subspaces": method.groups, "subspace_rank": method.rank}
        return {**sizes, "random_seed": _seed(seats), "use_dynamic_rank": False, "use_asa": False}


def _groups(site: Site, own: Mapping[str, Tensor], V: Tensor, groups: int, seed: int) -> Tensor:
    """Return the group of each row as peft finds it again; raises `DeltaTuneError` when it would find other directions as well."""
    U, found = subspaces(site, own, len(V), seed)
    if (V * found).sum(1).abs().mean() < 0.9:
        raise DeltaTuneError(
            f"the directions of {site.path!r} in the file are not those of the model's weight, so their groups are not known "
            "either; was it trained on this model? Merge it in peft."
        )
    return _clustered(U, groups)


def _seed(seats: Sequence[Seat]) -> int:
    """Return the seed from which peft finds the groups of all seats again; raises `DeltaTuneError` when there is none."""
    for seed in dict.fromkeys([0, seats[0].seed]):
        if all(torch.equal(_again(seat, seed), seat.leaves["g"]) for seat in seats):
            return seed
    raise DeltaTuneError(
        f"the groups of {seats[0].method} are not those that peft finds in this backbone when it loads a file, and its files "
        "cannot name them (where size is a module's whole width, rounding decides on them); write a smaller size, "
        "dt.to_lora(model, weights), or merge it."
    )


def _again(seat: Seat, seed: int) -> Tensor:
    groups, _, size = seat.leaves["A"].shape
    return _clustered(subspaces(seat.site, seat.own, size, seed)[0], groups)


def _clustered(U: Tensor, groups: int) -> Tensor:
    """Return the groups of rows by the very function that peft calls, as rows of a whole basis are all equally far apart."""
    from sklearn.cluster import KMeans

    means = KMeans(groups, init="random", n_init=1, max_iter=10, random_state=SEED)  # type: ignore[arg-type]
    found = means.fit_predict(U.contiguous().numpy())
    return torch.from_numpy(found).long()


def _wide(part: Tensor, rows: int, columns: int) -> Tensor:
    """Return a matrix in the corner of one of zeros."""
    whole = torch.zeros(rows, columns)
    whole[: part.shape[0], : part.shape[1]] = part
    return whole
