"""DELORA, GRALORA, PEANUT, POLY, ROAD, SUPERTUNING and BEFT: leaves under other names, or nearly so."""

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
from deltatune.formats.peft.table import Table
from deltatune.formats.seats import Seat
from deltatune.methods._sparse import LargestWeights, SmallestWeights
from deltatune.methods.addition.peanut import PEANuT
from deltatune.methods.addition.poly import Poly
from deltatune.methods.reparameterization.delora import DeLoRA
from deltatune.methods.reparameterization.gralora import GraLoRA
from deltatune.methods.reparameterization.road import RoAd
from deltatune.methods.specification.bitfit import BitFit
from deltatune.methods.specification.super_tuning import SuperTuning


class DeLoRAForm(Table):
    type = "DELORA"
    methods = (DeLoRA,)
    names = {"A": "delora_A", "B": "delora_B", "strength": "delora_lambda", "norms": "delora_w_norm"}
    fields = frozenset({"r", "delora_lambda", "module_dropout", "rank_pattern", "lambda_pattern"})

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        rank = held["delora_A"].shape[0]
        agree(config, "r", site.path, rank, config.at("rank_pattern", site.path, config.number("r", 8)))
        return DeLoRA(rank, float(config.at("lambda_pattern", site.path, config.number("delora_lambda", 15))))

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        rank, ranks = patterns({seat.site.path: seat.method.rank for seat in seats})
        start, starts = patterns({seat.site.path: plain(seat.method.strength) for seat in seats})
        return {"r": rank, "rank_pattern": ranks, "delora_lambda": start, "lambda_pattern": starts}


class GraLoRAForm(Table):
    type = "GRALORA"
    methods = (GraLoRA,)
    transposed = True
    names = {"A": "gralora_A", "B": "gralora_B"}
    turned = ("A", "B")
    fields = frozenset({"r", "alpha", "gralora_dropout", "gralora_k"})
    refused = {"hybrid_r": "it is a LoRA beside a GraLoRA in one"}

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        grid, _, rank = held["gralora_A"].shape
        agree(config, "r", site.path, rank, config.number("r", 32))
        return GraLoRA(rank, float(config.number("alpha", 64)), grid)

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        return {"r": method.rank, "alpha": plain(method.alpha), "gralora_k": method.grid, "hybrid_r": 0}


class PEANuTForm(Form):
    type = "PEANUT"
    methods = (PEANuT,)
    inner = {"E": "peanut_encoders", "F": "peanut_decoders"}
    needed = ("peanut_A.weight", "peanut_B.weight")
    suffixes = (*needed, *(f"peanut_{side}coders.{i}.weight" for side in ("en", "de") for i in range(64)))
    fields = frozenset({"r", "depth", "scaling"})
    demands = {"act_fn": "relu"}

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        rank, depth = held["peanut_A.weight"].shape[0], config.whole("depth", 0)
        agree(config, "r", site.path, rank, config.number("r", 32))
        agree(config, "depth", site.path, (len(held) - 2) // 2, depth)
        leaves = {side: held[f"peanut_{side}.weight"] for side in "AB"}
        for leaf, name in self.inner.items() if depth else ():
            leaves[leaf] = torch.stack([held[f"{name}.{i}.weight"] for i in range(depth)])
        return [Part(site.path, PEANuT(rank, depth, float(config.number("scaling", 1.0))), leaves)]

    def write(self, seat: Seat) -> Tensors:
        tensors = {f"peanut_{side}.weight": seat.leaves[side] for side in "AB"}
        for leaf, name in self.inner.items() if seat.method.depth else ():
            tensors |= {f"{name}.{i}.weight": tensor for i, tensor in enumerate(seat.leaves[leaf])}
        return tensors

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        return {"r": method.rank, "depth": method.depth, "scaling": method.scale, "act_fn": "relu"}


class PolyForm(Table):
    """Read for its first task; `of_task` gives the others."""

    type = "POLY"
    methods = (Poly,)
    names = {"A": "poly_lora_A", "B": "poly_lora_B", "logits": "poly_router.module_logits"}
    turned = ("A", "B")
    fields = frozenset({"r", "n_tasks", "n_skills", "n_splits"})
    demands = {"poly_type": "poly"}

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        splits, skills, _, rank = held["poly_lora_A"].shape
        agree(config, "r", site.path, rank, config.number("r", 8))
        return Poly(rank, skills, splits, len(held["poly_router.module_logits"]))

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        return {"r": method.rank, "n_tasks": method.tasks, "n_skills": method.skills, "n_splits": method.splits}


class RoAdForm(Table):
    type = "ROAD"
    methods = (RoAd,)
    names = {"angle": "road_theta", "scale": "road_alpha"}
    fields = frozenset({"variant", "group_size"})

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        count = 2 * len(held["road_theta"]) // site.d_out
        agree(config, "variant", site.path, count, float(str(config.get("variant", "road_1")).removeprefix("road_")))
        return RoAd(count, config.whole("group_size", 64))  # type: ignore[arg-type]

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        group = self.only("group", (seat.method._size(seat.site.d_out) for seat in seats))
        variant = self.only("variant", (seat.method.variant for seat in seats))
        return {"variant": f"road_{variant}", "group_size": group}


class SuperTuningForm(Table):
    type = "SUPERTUNING"
    methods = (SuperTuning,)
    names = {"value": "supertuning_values", "index": "supertuning_indices"}
    fields = frozenset({"sparsity", "lora_alpha", "lora_dropout", "save_precomputed_indices", "select_top"})
    refused = {"r": "it has a LoRA beside the entries"}

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        return super().read(config, site, {**held, "supertuning_indices": held["supertuning_indices"].long()})

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        k, numel = len(held["supertuning_values"]), site.d_in * site.d_out
        share = 1 - config.number("sparsity", 0.99)
        entries = LargestWeights() if config.flag("select_top", True) else SmallestWeights()
        return SuperTuning(share if int(share * numel) == k else (k + 0.5) / numel, entries)

    def write(self, seat: Seat) -> Tensors:
        return {name: t.int() if name.endswith("indices") else t for name, t in super().write(seat).items()}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        if not isinstance(method.entries, LargestWeights | SmallestWeights):
            raise DeltaTuneError(
                f"peft's SUPERTUNING has the largest or the smallest weights; this delta has {method}."
            )
        top = isinstance(method.entries, LargestWeights)
        return {"sparsity": 1 - method.share, "select_top": top, "save_precomputed_indices": True}


class BEFTForm(Table):
    type = "BEFT"
    methods = (BitFit,)
    names = {"b": "beft_bias"}

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        return BitFit()

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        return super().read(config, site, {name: tensor.flatten() for name, tensor in held.items()})

    def write(self, seat: Seat) -> Tensors:
        return {name: tensor[None] for name, tensor in super().write(seat).items()}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        return {}
