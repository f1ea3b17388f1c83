"""FOURIERFT and WAVEFT: which entries of a spectrum are trained is drawn by peft from a seed in the config.

The same generator draws them here, and they travel with the weights; written are those whose seed draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.form import Form
from deltatune.formats.peft.names import patterns, plain
from deltatune.formats.seats import Seat
from deltatune.methods.reparameterization.fourierft import FourierFT
from deltatune.methods.reparameterization.waveft import WaveFT

SEED = 777  # peft's default


def _places(site: Site, seed: int, count: int) -> Tensor:
    return torch.randperm(site.d_out * site.d_in, generator=Generator().manual_seed(seed))[:count]


class FourierForm(Form):
    type = "FOURIERFT"
    methods = (FourierFT,)
    transposed = True
    suffixes = needed = ("fourierft_spectrum",)
    fields = frozenset({"n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern"})
    kind: ClassVar[type[FourierFT | WaveFT]] = FourierFT
    scale: ClassVar[float] = 150.0

    def seed(self, config: Config) -> int:
        return config.whole("random_loc_seed", SEED)

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        c = held[self.suffixes[0]]
        places = _places(site, self.seed(config), len(c))
        return [
            Part(site.path, self.kind(len(c), float(config.number("scaling", self.scale))), {"c": c, "idx": places})
        ]

    def write(self, seat: Seat) -> Tensors:
        if not torch.equal(seat.leaves["idx"], _places(seat.site, seat.seed, seat.method.entries)):
            raise DeltaTuneError(
                f"peft's generator draws other entries than those of {seat.method} at {seat.site.path!r}, and its files "
                "cannot name them; write dt.to_lora(model, weights), or merge it."
            )
        return {self.suffixes[0]: seat.leaves["c"]}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        count, counts = patterns({seat.site.path: seat.method.entries for seat in seats})
        scale = self.only("scale", (seat.method.scale for seat in seats))
        own = {"n_frequency": count, "n_frequency_pattern": counts, "random_loc_seed": seats[0].seed}
        return {**own, "scaling": plain(scale)}


class WaveForm(FourierForm):
    type = "WAVEFT"
    methods = (WaveFT,)
    suffixes = needed = ("waveft_spectrum",)
    fields = FourierForm.fields | {"proportional_parameters"}
    demands = {"wavelet_family": "db1", "use_idwt": True}
    kind = WaveFT
    scale = 25.0

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        return {**super().settings(seats), "wavelet_family": "db1", "use_idwt": True, "proportional_parameters": False}
