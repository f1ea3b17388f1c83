"""OFT, BOFT and HRA: the input of a layer is turned."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.form import Form, agree
from deltatune.formats.peft.table import Table
from deltatune.formats.seats import Seat
from deltatune.methods._rotate import skew
from deltatune.methods.reparameterization.boft import BOFT
from deltatune.methods.reparameterization.hra import HRA
from deltatune.methods.reparameterization.oft import OFT


class OFTForm(Form):
    type = "OFT"
    methods = (OFT,)
    suffixes = ("oft_R.weight", "oft_r", "oft_s")
    fields = frozenset(["r", "oft_block_size", "module_dropout", "eps", "block_share", "num_cayley_neumann_terms"])
    refused = {
        "coft": "it pulls the rotations towards the identity whenever the layer is called",
        "use_cayley_neumann": "the rotations come from a series that is cut off, and are Cayley's own in deltatune; they are "
        "close for small ones: pass check=False to read them so",
    }

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        if "oft_R.weight" not in held:
            raise DeltaTuneError(
                f"{site.path!r} has {', '.join(held)}, the OFT of peft 0.15 and older, which is another parameterization; "
                "merge it with that version."
            )
        Q = held["oft_R.weight"]
        block = (1 + isqrt(1 + 8 * Q.shape[-1])) // 2  # block (block - 1) / 2 entries
        return [Part(site.path, OFT(block, config.flag("block_share")), {"Q": Q})]

    def write(self, seat: Seat) -> Tensors:
        return {"oft_R.weight": seat.leaves["Q"]}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        size = {"r": 0, "oft_block_size": method.block, "block_share": method.share}
        return {**size, "use_cayley_neumann": False, "coft": False, "module_dropout": 0.0}


class BOFTForm(Form):
    type = "BOFT"
    methods = (BOFT,)
    suffixes = needed = ("boft_R", "boft_s")
    fields = frozenset(["boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"])

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        R = held["boft_R"]
        leaves = {"Q": _upper((R - R.mT) / 2), "s": held["boft_s"].flatten()}
        return [Part(site.path, BOFT(R.shape[-1], R.shape[0]), leaves)]

    def write(self, seat: Seat) -> Tensors:
        return {"boft_R": skew(seat.leaves["Q"], seat.method.block), "boft_s": seat.leaves["s"][:, None]}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        size = {"boft_block_size": method.block, "boft_block_num": 0}
        return {**size, "boft_n_butterfly_factor": method.factors, "boft_dropout": 0.0}


def _upper(R: Tensor) -> Tensor:
    """Return the upper triangles of skew matrices, row by row."""
    rows, columns = torch.triu_indices(R.shape[-1], R.shape[-1], 1)
    return R[..., rows, columns]


class HRAForm(Table):
    type = "HRA"
    methods = (HRA,)
    names = {"U": "hra_u"}
    fields = frozenset({"r"})
    refused = {"apply_GS": "its reflections are made orthogonal to each other before they are used"}

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        rank = held["hra_u"].shape[-1]
        agree(config, "r", site.path, rank, config.number("r", 8))
        return HRA(rank)

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        return {"r": self.one(seats).rank, "apply_GS": False}
