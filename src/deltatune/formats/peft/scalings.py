"""IA3, LN_TUNING, MISS (and BONE, its first name), SHIRA, C3A and TRAINABLE_TOKENS: one tensor at each module, or few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.form import Form, agree
from deltatune.formats.peft.lora import token_part, tokens_of
from deltatune.formats.peft.table import Table
from deltatune.formats.seats import Seat
from deltatune.methods._sparse import LargestWeights
from deltatune.methods.addition.ia3 import IA3
from deltatune.methods.addition.trainable_tokens import TrainableTokens
from deltatune.methods.reparameterization.bat import Bat
from deltatune.methods.reparameterization.c3a import C3A
from deltatune.methods.reparameterization.miss import MiSS
from deltatune.methods.specification.ln_tuning import LNTuning
from deltatune.methods.specification.shira import SHiRA


class IA3Form(Form):
    type = "IA3"
    methods = (IA3,)
    transposed = True
    suffixes = needed = ("ia3_l",)
    fields = frozenset({"feedforward_modules", "init_ia3_weights"})

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        vector = held["ia3_l"]
        if vector.dim() != 2 or 1 not in vector.shape:
            raise DeltaTuneError(
                f"ia3_l of {site.path!r} has the shape {tuple(vector.shape)}; it is [out, 1] or [1, in]."
            )
        return [Part(site.path, IA3(), {"l": vector}, side="in" if vector.shape[0] == 1 else "out")]

    def write(self, seat: Seat) -> Tensors:
        return {"ia3_l": seat.leaves["l"]}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        return {}  # which modules are rescaled at their input, the writer says


class LNForm(Form):
    type = "LN_TUNING"
    methods = (LNTuning,)
    kinds = ("norm",)
    suffixes = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        return [Part(site.path, LNTuning(), {f"{key.rpartition('.')[2]}.value": t for key, t in held.items()})]

    def write(self, seat: Seat) -> Tensors:
        return {f"ln_tuning_layers.{seat.site.tensor}": seat.leaves["value"]}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        return {}


class MiSSForm(Form):
    type = "MISS"
    methods = (MiSS, Bat)
    suffixes = ("miss_block", "bone_block")
    fields = frozenset({"r", "mini_r", "miss_dropout", "bone_dropout"})

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        (M,) = held.values()
        agree(config, "r", site.path, M.shape[-1] if M.dim() == 3 else M.shape[0], config.number("r", 64))
        if M.dim() == 3:
            return [Part(site.path, Bat(M.shape[-1]), {"M": M})]
        columns = M.shape[1] if config.get("init_weights") == "mini" else 0
        return [Part(site.path, MiSS(M.shape[0], columns), {"M": M})]

    def write(self, seat: Seat) -> Tensors:
        return {"miss_block": seat.leaves["M"]}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        if any(isinstance(seat.method, Bat) for seat in seats):
            block = self.only("shape of block", (tuple(seat.leaves["M"].shape[2:]) for seat in seats))
            if not block:
                raise DeltaTuneError(
                    "peft's MISS is MiSS or Bat at all modules; this delta has both: write two folders."
                )
            return {"r": block[0], "mini_r": 1, "init_weights": "bat"}
        method = self.one(seats)
        small = (
            {"mini_r": method.columns, "init_weights": "mini"}
            if method.columns
            else {"mini_r": 1, "init_weights": True}
        )
        return {"r": method.rank, "miss_dropout": 0.0, **small}


class BoneForm(MiSSForm):
    """What peft called MiSS before 0.19; peft's own script for it renames the tensors, and so does this."""

    type = "BONE"
    methods = ()


class SHiRAForm(Form):
    """Which entries are trained stands in the file, so the delta says that they were chosen, not drawn from its seed."""

    type = "SHIRA"
    methods = (SHiRA,)
    suffixes = needed = ("shira_indices", "shira_weight")
    fields = frozenset({"r", "mask_type", "random_seed"})

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        rows, columns = held["shira_indices"].long()
        rank = config.whole("r", 32)
        agree(config, "r", site.path, len(rows), rank * (site.d_in + site.d_out))
        index = {"index": rows * site.d_in + columns}
        return [Part(site.path, SHiRA(rank, LargestWeights()), {"value": held["shira_weight"], **index})]

    def write(self, seat: Seat) -> Tensors:
        index = seat.leaves["index"]
        places = torch.stack([index // seat.site.d_in, index % seat.site.d_in]).int()
        return {"shira_indices": places, "shira_weight": seat.leaves["value"]}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        return {"r": self.only("rank", (seat.method.rank for seat in seats)), "mask_type": "random"}


class C3AForm(Table):
    type = "C3A"
    methods = (C3A,)
    names = {"w": "c3a_kernel"}
    fields = frozenset({"block_size", "block_size_pattern"})

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        return C3A(held["c3a_kernel"].shape[-1])

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        return {"block_size": self.only("block_size", (seat.leaves["w"].shape[-1] for seat in seats))}


class TokensForm(Form):
    type = "TRAINABLE_TOKENS"
    methods = (TrainableTokens,)
    kinds = ("embedding", "linear")
    saves = False
    suffixes = needed = ("trainable_tokens_delta",)
    fields = frozenset({"token_indices"})

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        (rows,) = held.values()
        return [token_part(config, "token_indices", site, config.get("token_indices", []), rows)]

    def write(self, seat: Seat) -> Tensors:
        if seat.site.tensor != "weight":
            raise DeltaTuneError(
                f"peft has trainable tokens in tables, not in the {seat.site.tensor} of {seat.site.path!r}."
            )
        return {"trainable_tokens_delta": seat.leaves["rows"]}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        return {"token_indices": tokens_of(self.one(seats), seats[0])}
