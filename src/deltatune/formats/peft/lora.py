"""LORA: plain, rank-stabilised and weight-decomposed (DoRA), at linears, embeddings and convolutions, with rank patterns.

    peft: y + s (B A x + c)     A: lora_A [r, in]   B: lora_B [out, r]   c: lora_B.bias [out]   s = alpha / r or alpha / sqrt(r)

c is a `BitFit` here, of s c. A factor that deltatune keeps beside its start (PiSSA) is written as one pair of wider factors,
and methods at several roles of one packed module as one with factors side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.method import Bag
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.experts import (
    expert_part,
    experts_of,
    plain_experts,
    take_experts,
    target_parameters,
    write_experts,
)
from deltatune.formats.peft.form import Form, agree
from deltatune.formats.peft.names import patterns, plain
from deltatune.formats.seats import Seat
from deltatune.methods.addition.trainable_tokens import TrainableTokens
from deltatune.methods.combine.per_expert import PerExpert
from deltatune.methods.reparameterization.dora import DoRA
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.methods.specification.bitfit import BitFit

MOVED = ("pissa", "corda", "olora", "loftq", "lora_ga")  # starts that change the backbone's own weights
TOKENS = "token_adapter.trainable_tokens_delta"
MAGNITUDE = "lora_magnitude_vector"
BIAS = "lora_B.bias"


class LoRAForm(Form):
    type = "LORA"
    methods = (LoRA, DoRA)
    kinds = ("linear", "embedding", "conv")
    beside = (TrainableTokens, PerExpert)
    transposed = True
    suffixes = ("lora_A.weight", "lora_B.weight", BIAS, MAGNITUDE, "lora_embedding_A", "lora_embedding_B", TOKENS)
    fields = frozenset(
        [
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "lora_bias",
            "init_lora_weights",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "loftq_config",
            "qalora_group_size",
            "trainable_token_indices",
            "velora_config",
            "merge_weights",
            "target_parameters",
        ]
    )
    refused = {
        "layer_replication": "it makes copies of blocks, and deltatune changes no backbone",
        "alora_invocation_tokens": "a LoRA that starts at certain tokens is no method of deltatune",
        "arrow_config": "it routes between several adapters; read each of them by itself",
        "use_qalora": "its A works on pooled groups of a quantized layer, which deltatune does not have",
        "use_bdlora": "block-diagonal factors are not expressed",
        "kasa_config": "KaSA cuts singular values off the backbone's weights",
        "monteclora_config": "MonteCLoRA draws its factors at random",
        "enable_lora": "peft 0.2 and older packed several projections into one layer (MergedLinear), in another layout; "
        "save it again with peft 0.3 or newer",
    }

    def check(self, config: Config) -> None:
        super().check(config)
        start = str(config.get("init_lora_weights", True))
        if start.lower().startswith(MOVED):
            raise DeltaTuneError(
                f"{config.source} says init_lora_weights={start!r}: such factors hold for a backbone whose weights that start "
                "has changed. Save them in peft with save_pretrained(..., path_initial_model_for_weight_conversion=...) first; "
                "or pass check=False if the model is the changed one."
            )

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        parts = _tokens(config, site, held.pop(TOKENS)) if TOKENS in held else []
        if not held:
            return parts
        A, B = (held.get(f"lora_{side}.weight", held.get(f"lora_embedding_{side}")) for side in "AB")
        if A is None or B is None:
            raise DeltaTuneError(
                f"the file holds {', '.join(held)} of {site.path!r}; LORA needs its A and its B: save it again, whole."
            )
        if B.dim() > 2 and site.kind == "linear":
            raise DeltaTuneError(
                f"lora_B of {site.path!r} has the shape {tuple(B.shape)}: {self.refused['enable_lora']}."
            )
        if A.dim() < 2:
            raise DeltaTuneError(
                f"lora_A of {site.path!r} has the shape {tuple(A.shape)}; it was saved in shards: gather them."
            )
        leaves = {"A": A.flatten(1), "B": B.flatten(1)}
        rank = A.shape[0]
        agree(config, "r", site.path, rank, config.at("rank_pattern", site.path, config.number("r", 8)))
        alpha = self._alpha(config, site.path, rank)
        method = DoRA(rank, alpha) if MAGNITUDE in held else LoRA(rank, alpha)
        if MAGNITUDE in held:
            leaves["m"] = held[MAGNITUDE].flatten()
        elif config.flag("use_dora"):
            raise DeltaTuneError(f"{config.source} says use_dora, but {site.path!r} has no {MAGNITUDE}.")
        parts.append(Part(site.path, method, leaves))
        if BIAS in held:
            parts.append(Part(site.path, BitFit(), {"b": held[BIAS] * (alpha / rank)}))
        return parts

    def take(self, model: nn.Module, config: Config, held: dict[str, Tensors]) -> list[Part]:
        parts = []
        for path, name, own in take_experts(model, config, held):
            rank = int(config.at("rank_pattern", f"{path}.{name}", config.number("r", 8)))
            parts.append(expert_part(model, rank, self._alpha(config, f"{path}.{name}", rank), config, path, name, own))
        return parts

    def _alpha(self, config: Config, path: str, rank: int) -> float:
        """Return the alpha with which a module's change is scaled by alpha / rank."""
        alpha = config.at("alpha_pattern", path, config.number("lora_alpha", 8))
        return float(alpha * sqrt(rank) if config.flag("use_rslora") else alpha)

    def prepare(self, seats: list[Seat]) -> list[Seat]:
        return plainly(seats)

    def write_beside(self, model: nn.Module, seats: Sequence[Seat]) -> tuple[Tensors, dict[str, Any]]:
        experts, tokens = experts_of(seats)
        tensors = {f"{seat.site.path}.{TOKENS}": seat.leaves["rows"] for seat in tokens} | write_experts(experts)
        fields: dict[str, Any] = {"target_parameters": target_parameters(model, experts)} if experts else {}
        rows = {seat.site.path: tokens_of(seat.method, seat) for seat in tokens}
        return tensors, fields | ({"trainable_token_indices": rows} if tokens else {})

    def write(self, seat: Seat) -> Tensors:
        site, leaves = seat.site, seat.leaves
        if site.kind == "conv" and isinstance(seat.method, DoRA):
            raise DeltaTuneError(f"{seat.method} at the convolution {site.path!r} is not written for peft; merge it.")
        A, B = leaves["A"], leaves["B"]
        if site.kind == "embedding":
            tensors = {"lora_embedding_A": A, "lora_embedding_B": B}
        elif site.kind == "conv":
            kernel = seat.shape[1:]
            tensors = {
                "lora_A.weight": A.view(-1, *kernel),
                "lora_B.weight": B.view(*B.shape, *[1] * (len(kernel) - 1)),
            }
        else:
            tensors = {"lora_A.weight": A, "lora_B.weight": B}
        return tensors | ({MAGNITUDE: leaves["m"]} if "m" in leaves else {})

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        experts, others = experts_of(seats)
        seats = [*(s for s in others if not isinstance(s.method, TrainableTokens)), *plain_experts(experts)]
        kinds = {type(seat.method) for seat in seats}
        if len(kinds) > 1:
            raise DeltaTuneError(
                "peft's LORA is LoRA or DoRA at all of its modules; this delta has both: write two folders."
            )
        rank, ranks = patterns({_key(seat.site): seat.method.rank for seat in seats})
        alpha, alphas = patterns({_key(seat.site): plain(seat.method.alpha) for seat in seats})
        return {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": kinds == {DoRA},
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "init_lora_weights": True,
            "bias": "none",
        }


def _key(site: Site) -> str:
    return f"{site.path}.{site.tensor}" if site.tensor else site.path


def tokens_of(method: TrainableTokens, seat: Seat) -> list[int]:
    """Return the tokens of a table counted from its start, as peft has them."""
    return [token % seat.shape[0] for token in method.tokens]


def _tokens(config: Config, site: Site, rows: Tensor) -> list[Part]:
    said = config.get("trainable_token_indices", [])
    if isinstance(said, dict):
        said = next((ids for name, ids in said.items() if f".{site.path}".endswith(f".{name}")), [])
    return [token_part(config, "trainable_token_indices", site, said, rows)]


def token_part(config: Config, field: str, site: Site, ids: Any, rows: Tensor) -> Part:
    """Return the rows of an embedding as TrainableTokens."""
    if not isinstance(ids, list) or len(ids) != len(rows):
        raise DeltaTuneError(
            f"the file holds {len(rows)} rows of {site.path!r}, and {config.source} names other tokens in {field}: {ids!r}."
        )
    return Part(site.path, TrainableTokens(tuple(ids)), {"weight.rows": rows})


def plainly(seats: list[Seat]) -> list[Seat]:
    """Return LoRA's seats with A and B alone, one for each module: what a start keeps beside them, and parts, side by side."""
    modules: dict[str, list[Seat]] = {}
    for seat in seats:
        modules.setdefault(seat.site.path, []).append(_unfolded(seat))
    return [
        found[0] if len(found) == 1 and found[0].site.part is None else _joined(found) for found in modules.values()
    ]


def _unfolded(seat: Seat) -> Seat:
    if not isinstance(seat.method, LoRA):
        return seat
    p = seat.method.unfold(Bag(seat.leaves))
    rank = p.A.shape[0]
    return replace(seat, method=LoRA(rank, seat.method.alpha / seat.method.rank * rank), leaves={"A": p.A, "B": p.B})


def _joined(seats: list[Seat]) -> Seat:
    """Return the LoRAs at one module, or at parts of it, as one: A stacked, B side by side in the rows of each part."""
    for seat in seats:
        if not isinstance(seat.method, LoRA):
            place = "a part of" if seat.site.part else "several methods at"
            raise DeltaTuneError(f"peft knows one DoRA, at a whole module; this delta has {place} {seat.site.path!r}.")
    rank = sum(seat.method.rank for seat in seats)
    blocks = [_rows(seat) * (seat.method.alpha / seat.method.rank) for seat in seats]
    leaves = {"A": torch.cat([seat.leaves["A"] for seat in seats]), "B": torch.cat(blocks, 1)}
    return replace(seats[0], method=LoRA(rank, float(rank)), leaves=leaves)


def _rows(seat: Seat) -> Tensor:
    """Return B of a part as rows of the whole module's output."""
    part, B = seat.site.part, seat.leaves["B"]
    return B if part is None else part.put(B.new_zeros(seat.shape[1 if seat.site.transposed else 0], B.shape[1]), B, 0)
