"""LOHA, LOKR, HIRA and ADALORA: changes of a weight by products of small factors."""

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
from deltatune.methods.reparameterization.adalora import AdaLoRA
from deltatune.methods.reparameterization.hira import HiRA
from deltatune.methods.reparameterization.loha import LoHa
from deltatune.methods.reparameterization.lokr import LoKr

LYCORIS = frozenset(
    [
        "r",
        "alpha",
        "rank_dropout",
        "module_dropout",
        "rank_pattern",
        "alpha_pattern",
        "rank_dropout_scale",
        "decompose_factor",
    ]
)


def ranks_and_alphas(seats: Sequence[Seat]) -> dict[str, Any]:
    """Return the fields of LyCORIS's types, which may have another rank and alpha at every module."""
    rank, ranks = patterns({seat.site.path: seat.method.rank for seat in seats})
    alpha, alphas = patterns({seat.site.path: plain(seat.method.alpha) for seat in seats})
    return {"r": rank, "alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas, "use_effective_conv2d": False}


class LoHaForm(Table):
    type = "LOHA"
    methods = (LoHa,)
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    fields = LYCORIS
    refused = {"use_effective_conv2d": "its factors of a kernel are no LoHa of a matrix"}

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        rank = held["hada_w1_a"].shape[1]
        agree(config, "r", site.path, rank, config.at("rank_pattern", site.path, config.number("r", 8)))
        return LoHa(rank, float(config.at("alpha_pattern", site.path, config.number("alpha", 8))))

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        return ranks_and_alphas(seats)


class LoKrForm(Table):
    """peft 0.13 and older did not scale the product by alpha / r; their configs have no `rank_dropout_scale` yet."""

    type = "LOKR"
    methods = (LoKr,)
    names = {"C": "lokr_w1", "D": "lokr_w2", "B": "lokr_w2_a", "A": "lokr_w2_b"}
    needed = ("lokr_w1",)
    fields = LYCORIS
    refused = {
        "decompose_both": "LoKr's first factor is one matrix here",
        "use_effective_conv2d": "its factors of a kernel are no LoKr of a matrix",
    }

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        rank = int(config.at("rank_pattern", site.path, config.whole("r", 8)))
        if "lokr_w2_a" in held:
            agree(config, "r", site.path, held["lokr_w2_a"].shape[1], rank)
        scaled = "rank_dropout_scale" in config.fields
        alpha = config.at("alpha_pattern", site.path, config.number("alpha", 8)) if scaled else rank
        return LoKr(rank, float(alpha), config.whole("decompose_factor", -1))

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        factor = self.only("decompose_factor", (seat.method.factor for seat in seats))
        return {**ranks_and_alphas(seats), "decompose_factor": factor, "decompose_both": False} | {
            "rank_dropout_scale": False
        }


class HiRAForm(Table):
    type = "HIRA"
    methods = (HiRA,)
    transposed = True
    names = {"A": "hira_A", "B": "hira_B"}
    fields = frozenset({"r", "hira_dropout", "rank_pattern"})

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        rank = held["hira_A"].shape[0]
        agree(config, "r", site.path, rank, config.at("rank_pattern", site.path, config.number("r", 32)))
        return HiRA(rank)

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        rank, ranks = patterns({seat.site.path: seat.method.rank for seat in seats})
        return {"r": rank, "rank_pattern": ranks, "hira_dropout": 0.0}


class AdaLoRAForm(Form):
    """The running means of the allocator stay behind: peft does not keep them."""

    type = "ADALORA"
    methods = (AdaLoRA,)
    transposed = True
    suffixes = needed = ("lora_A", "lora_B", "lora_E")
    fields = frozenset(
        [
            "r",
            "init_r",
            "target_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "total_step",
            "rank_pattern",
            "lora_alpha",
            "lora_dropout",
            "init_lora_weights",
            "qalora_group_size",
            "alpha_pattern",
        ]
    )

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        n, whole = held["lora_A"].shape[0], config.whole("init_r", 12)
        if n == 0:
            return []  # the allocator left no rank here
        if n > whole or (n < whole and not config.get("rank_pattern")):
            agree(config, "init_r", site.path, n, whole)
        # ranks that the allocator cut keep the scale of the rank they started with
        alpha = (config.number("lora_alpha", 8) or whole) * n / whole
        rank = min(config.whole("target_r", 8), n)
        method = AdaLoRA(
            rank,
            float(alpha),
            n - rank,
            warmup=config.whole("tinit", 0),
            cooldown=config.whole("tfinal", 0),
            interval=config.whole("deltaT", 1),
            decay=config.number("beta1", 0.85),
            orthogonality=config.number("orth_reg_weight", 0.5),
        )
        leaves = {"P": held["lora_B"], "lam": held["lora_E"].flatten(), "Q": held["lora_A"]}
        means = {f"means_{leaf}": torch.zeros(2, *tensor.shape) for leaf, tensor in leaves.items()}
        return [Part(site.path, method, leaves | means | {"kept": torch.ones(n)})]

    def write(self, seat: Seat) -> Tensors:
        return {"lora_A": seat.leaves["Q"], "lora_B": seat.leaves["P"], "lora_E": seat.leaves["lam"][:, None]}

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        method = self.one(seats)
        if method.alpha <= 0:
            raise DeltaTuneError(f"peft's ADALORA has no alpha of 0 or less; this delta has {method}.")
        steps = {"tinit": method.warmup, "tfinal": method.cooldown, "deltaT": method.interval}
        return {
            "init_r": method.width,
            "target_r": method.rank,
            "lora_alpha": plain(method.alpha),
            "total_step": method.warmup + method.cooldown + method.interval,
            **steps,
            "beta1": method.decay,
            "beta2": method.decay,
            "orth_reg_weight": method.orthogonality,
            "rank_pattern": None,
        }
