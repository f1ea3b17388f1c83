"""GLORA, PSOFT, OSF and DEFT: what the file says depends on the weight of the module."""

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
from deltatune.formats.peft.names import patterns, plain
from deltatune.formats.peft.table import Table, check_derived, fresh
from deltatune.formats.seats import Seat, weight_of
from deltatune.methods.reparameterization.deft import DEFT
from deltatune.methods.reparameterization.glora import GLoRA
from deltatune.methods.reparameterization.osf import OSF
from deltatune.methods.reparameterization.psoft import PSOFT


class GLoRAForm(Form):
    """peft's C adds W C to the bias, and numbers stand for vectors of equal entries: all of them are one shift e here."""

    type = "GLORA"
    methods = (GLoRA,)
    ways = {"As": "glora_A.Xu", "Bs": "glora_A.Xd", "At": "glora_B.Xu", "Bt": "glora_B.Xd"}
    needed = tuple(ways.values())
    suffixes = tuple(f"glora_{side}.{end}" for side in "ABCDE" for end in ("Xd", "Xu", "X", "zeros"))
    fields = frozenset({"r", "config_C", "config_D_E"})
    demands = {"config_A_B": "lora"}

    def read_at(self, config: Config, site: Site, held: Tensors, own: Tensors) -> list[Part]:
        rank = held["glora_A.Xu"].shape[0]
        agree(config, "r", site.path, rank, config.number("r", 8))
        leaves = {leaf: held[name] for leaf, name in self.ways.items()}
        if site.bias:
            zero = torch.zeros(site.d_out)
            scale, shift = (zero + held.get(f"glora_{side}.X", 0) for side in "DE")
            C = held["glora_C.Xd"] @ held["glora_C.Xu"] if "glora_C.Xd" in held else held.get("glora_C.X")
            extra = zero if C is None else (weight_of(site, own) @ C).flatten()
            leaves |= {"d": scale, "e": shift + extra}
        return [Part(site.path, GLoRA(rank), leaves)]

    def write(self, seat: Seat) -> Tensors:
        names = self.ways | ({"d": "glora_D.X", "e": "glora_E.X"} if seat.site.bias else {})
        nothing = {"glora_C.zeros": torch.zeros(seat.site.d_in, 1)}
        if not seat.site.bias:
            nothing |= {f"glora_{side}.zeros": torch.zeros(seat.site.d_out) for side in "DE"}
        return {name: seat.leaves[leaf] for leaf, name in names.items()} | nothing

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        rank = self.only("rank", (seat.method.rank for seat in seats))
        return {"r": rank, "config_A_B": "lora", "config_C": "none", "config_D_E": "vector"}


class PSOFTForm(Table):
    """The singular vectors are not in the file: peft computes them from the backbone, and so does this."""

    type = "PSOFT"
    methods = (PSOFT,)
    names = {"Q": "psoft_R.weight", "a": "psoft_R.vector_a", "b": "psoft_R.vector_b"}
    fields = frozenset(
        ["r", "psoft_alpha", "psoft_dropout", "psoft_svd_lowrank_niter", "random_seed", "num_cayley_neumann_terms"]
    )
    refused = {"use_cayley_neumann": "the rotation comes from a series that is cut off"}
    demands = {"ab_svd_init": "psoft_init", "psoft_svd": "full", "psoft_orth": True} | {
        "psoft_mag_a": True,
        "psoft_mag_b": True,
    }

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        rank = len(held["psoft_R.vector_a"])
        agree(config, "r", site.path, rank, config.number("r", 32))
        return PSOFT(rank)

    def write(self, seat: Seat) -> Tensors:
        check_derived(seat, ("A", "B"))
        return super().write(seat)

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        rank = self.one(seats).rank
        ones = {"psoft_orth": True, "psoft_mag_a": True, "psoft_mag_b": True, "use_cayley_neumann": False}
        return {"r": rank, "psoft_alpha": rank, "psoft_svd": "full", "ab_svd_init": "psoft_init", **ones}


class OSFForm(Table):
    """The major directions are not in the file: peft computes them from the backbone, and so does this."""

    type = "OSF"
    methods = (OSF,)
    names = {leaf: f"osf_svd_params.{leaf.upper()}_low" for leaf in "usv"}
    fields = frozenset({"effective_rank", "rank_pattern"})
    refused = {"target_svd_config": "it names ranks by modules in a way that is not read"}

    def read_at(self, config: Config, site: Site, held: Tensors, own: Tensors) -> list[Part]:
        (part,) = self.read(config, site, held)
        U0, V0, Uh, Vh = (fresh(part.method, site, own, leaf) for leaf in ("U0", "V0", "Uh", "Vh"))
        stray = [(Uh.mT @ (part.leaves["u"] - U0)).abs().max(), ((part.leaves["v"] - V0) @ Vh.mT).abs().max()]
        if max(stray) > 1e-3:
            raise DeltaTuneError(
                f"the factors of {site.path!r} have a part of {max(stray):.2g} in the major directions of the model's weight, "
                "which OSF keeps free: was it trained on this model? Merge it in peft."
            )
        return [part]

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        whole = min(site.d_in, site.d_out)
        major = whole - len(held["osf_svd_params.S_low"])
        return OSF() if major == int(whole * 0.5) else OSF((major + 0.5) / whole)

    def write(self, seat: Seat) -> Tensors:
        check_derived(seat, ("U0", "S0", "V0", "Uh", "Vh"))
        U0, V0, Uh, Vh = (seat.leaves[leaf] for leaf in ("U0", "V0", "Uh", "Vh"))
        U, V = seat.leaves["u"] - U0, seat.leaves["v"] - V0
        free = {"u": U0 + U - Uh @ (Uh.mT @ U), "v": V0 + V - (V @ Vh.mT) @ Vh, "s": seat.leaves["s"]}
        return {self.names[leaf]: tensor for leaf, tensor in free.items()}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        rank, ranks = patterns({seat.site.path: seat.leaves["Uh"].shape[1] for seat in seats})
        return {
            "effective_rank": rank,
            "rank_pattern": {path.removeprefix("^").replace("\\", ""): r for path, r in ranks.items()},
        }


class DEFTForm(Form):
    """P stands for P_0 here, and R as its difference from relu(P)^T W / scale, which the backbone gives."""

    type = "DEFT"
    methods = (DEFT,)
    transposed = True
    suffixes = needed = ("deft_P", "deft_R")
    fields = frozenset({"r", "init_scale", "alpha", "deft_dropout"})
    refused = {"para": "it takes a subspace out and puts nothing in"}
    demands = {"decomposition_method": "relu"}

    def read_at(self, config: Config, site: Site, held: Tensors, own: Tensors) -> list[Part]:
        P, rank = held["deft_P"], held["deft_P"].shape[1]
        agree(config, "r", site.path, rank, min(config.number("r", 8), site.d_out))
        method = DEFT(rank, float(config.number("alpha", 0.0)))
        S = held["deft_R"] - P.relu().mT @ weight_of(site, own) / method._scale
        return [Part(site.path, method, {"P0": P, "D": torch.zeros_like(P), "S": S})]

    def write(self, seat: Seat) -> Tensors:
        P0 = seat.leaves["P0"]
        R = P0.relu().mT @ seat.W / seat.method._scale + seat.leaves["S"]
        return {"deft_P": P0 + seat.leaves["D"], "deft_R": R}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        alpha = plain(method.alpha) if method.alpha else None
        return {"r": method.rank, "alpha": alpha, "decomposition_method": "relu", "para": False}
