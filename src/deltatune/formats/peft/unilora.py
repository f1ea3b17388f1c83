"""UNILORA: which entry of the one vector each entry of a factor copies stands in the file, or is drawn from its seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from deltatune.core.site import Site, anatomy
from deltatune.core.where import select
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.form import Form, agree
from deltatune.formats.peft.names import aimed
from deltatune.formats.seats import Seat
from deltatune.methods.reparameterization.uni_lora import UniLoRA

THETA = "unilora_theta_d"
A, B = "unilora_indices_A", "unilora_indices_B"
SCALES = {A: "unilora_scales_A", B: "unilora_scales_B"}


class UniLoRAForm(Form):
    """A module's indices are those of its A, then of its B, where ours go rank by rank."""

    type = "UNILORA"
    methods = (UniLoRA,)
    transposed = True
    shared = (THETA,)
    suffixes = (A, B, *SCALES.values())
    needed = (A, B, THETA)
    fields = frozenset(["r", "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "save_indices"])

    def untold(self, model: nn.Module, config: Config, shared: Tensors) -> dict[str, Tensors]:
        parts, rank = anatomy(model), config.whole("r", 4)
        sites = [select(model, f"path:{path}", parts)[0] for path in aimed(model, config)]
        if not sites or THETA not in shared:
            return {}
        size = len(shared[THETA])
        UniLoRA(rank, size).declared(sites)  # refuses a rank that does not fit
        sizes = [entries for site in sites for entries in (rank * site.d_in, rank * site.d_out)]
        drawn = iter(_drawn(sum(sizes), size, config.whole("proj_seed", 42)).split(sizes))
        return {site.path: {A: next(drawn).view(rank, -1), B: next(drawn).view(-1, rank)} for site in sites}

    def spread(self, config: Config, held: Mapping[str, Tensors], shared: Tensors) -> dict[str, Tensors]:
        indices = torch.cat([own[name].flatten() for own in held.values() for name in (A, B) if name in own])
        size = len(shared.get(THETA, ()))
        if not 0 <= indices.min() <= indices.max() < size:
            raise DeltaTuneError(
                f"the file beside {config.source} has indices from {indices.min()} to {indices.max()}, but {size} entries in "
                f"{THETA}; they do not belong together."
            )
        n = torch.bincount(indices, minlength=size)
        return {path: shared | own | {"n": n} for path, own in held.items()}

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        rank, size, n = held[A].shape[0], len(held[THETA]), held["n"]
        agree(config, "r", site.path, rank, config.number("r", 4))
        agree(config, "theta_d_length", site.path, size, config.number("theta_d_length", 256))
        for index, scale in SCALES.items():
            if scale in held and not torch.allclose(held[scale], n[held[index]].float().rsqrt(), rtol=1e-2):
                raise DeltaTuneError(
                    f"{scale} of {site.path!r} is not 1 / sqrt of how often its indices stand in the file; is it whole?"
                )
        j = torch.cat([held[A], held[B].mT], 1).flatten()
        return [Part(site.path, UniLoRA(rank, size), {"j": j, "n": n, "theta": held[THETA]})]

    def write(self, seat: Seat) -> Tensors:
        j = seat.leaves["j"].view(seat.method.rank, -1)
        indices = {A: j[:, : seat.site.d_in], B: j[:, seat.site.d_in :].mT}
        return indices | {SCALES[name]: seat.leaves["n"][index].float().rsqrt() for name, index in indices.items()}

    def share(self, seats: Sequence[Seat]) -> Tensors:
        theta = seats[0].leaves["theta"]
        if not all(torch.equal(seat.leaves["theta"], theta) for seat in seats):
            raise DeltaTuneError(
                "peft's UNILORA has one vector for all modules; this delta has one in each of its terms. Write one term."
            )
        return {THETA: theta}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        return {"r": method.rank, "theta_d_length": method.size, "proj_seed": 42, "save_indices": True}


def _drawn(count: int, below: int, seed: int) -> Tensor:
    """Return the whole numbers below `below`, each as often as any other up to one, in the order that peft draws."""
    generator = numpy.random.default_rng(seed)
    rest = generator.choice(below, count % below, replace=False)
    drawn = numpy.concatenate([numpy.repeat(numpy.arange(below), count // below), rest])
    generator.shuffle(drawn)
    return torch.from_numpy(drawn)
