"""Cartridge: the keys and values of a long text, trained further in its place (Eyuboglu et al., 2025, arXiv:2506.06266).

    head = softmax(q [K_0; K; K_X]^T / sqrt(d_h)) [V_0; V; V_X]        K_0, V_0: [frozen, d_kv]   K, V: [length - frozen, d_kv]

The first `frozen` tokens, where attention rests, are stored and not trained. With `init=KeysValues()` all of them start as
what the backbone makes of the first `length` tokens of a text, so that a fresh cartridge computes what the text in front
does; `dt.init(..., evidence={"keys_values": keys_values(model, ids)})` supplies it. Otherwise they start N(0, 1). Parameters: 2 (length
- frozen) d_kv a site.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Normal, Shape
from deltatune.core.method import OnHeads
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class KeysValues(Init):
    """A text's keys and values at the site, [2, n, d_kv], from its token `start` on; needs them as evidence."""

    start: int = 0

    needs = frozenset({"keys_values"})

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        known = given.evidence["keys_values"]
        if given.site.path not in known:
            raise DeltaTuneError(
                f"the keys and values of {given.site.path!r} are not among those of {', '.join(known)}."
            )
        own, end = known[given.site.path], self.start + shape[1]
        if own.shape[1] < end or own.shape[2] != shape[2]:
            raise DeltaTuneError(
                f"a cartridge of length {end} and width {shape[2]} needs as many tokens of text; the evidence has "
                f"{own.shape[1]} of width {own.shape[2]}: write length={own.shape[1]} or give a longer text."
            )
        return own[:, self.start : end].to("cpu", torch.float32)


@dataclass(frozen=True)
class Cartridge(OnHeads):
    """Cartridge: a text's keys and values, [K_0; K; K_X] and [V_0; V; V_X], trained in its place (Eyuboglu et al., 2025)."""

    length: int = 128
    frozen: int = 1
    init: Init = Normal(1.0)

    where = "attn"
    breaks = {**OnHeads.breaks, "identity": "keys in front of the text take attention from the first step on"}  # noqa: RUF012

    def __post_init__(self) -> None:
        check_least(self, length=self.length)
        if not 0 <= self.frozen < self.length:
            raise DeltaTuneError(
                f"Cartridge(length={self.length}, frozen={self.frozen}) trains nothing; freeze fewer than {self.length}."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        assert site.heads is not None  # placing checks it
        width = site.heads.key * site.heads.width
        later = replace(self.init, start=self.frozen) if isinstance(self.init, KeysValues) else self.init
        kept = {"KV0": Leaf((2, self.frozen, width), self.init, trained=False, stored=True)} if self.frozen else {}
        return {**kept, "KV": Leaf((2, self.length - self.frozen, width), later)}

    def prefix(self, p: Any, heads: int) -> tuple[Tensor, Tensor]:
        whole = torch.cat([p.KV0, p.KV], 1) if self.frozen else p.KV
        K, V = whole.unflatten(-1, (heads, -1)).transpose(1, 2)
        return K, V
