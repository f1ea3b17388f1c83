"""Anatomy tables: one small file a model family, that says where each role is.

A family registers by being defined: every `Family` in a module of this package is found by itself. Paths are relative
to the base model (stacks) or to a block (roles); `-1` stands for the last child of a list. A path that a given model
does not have (the cross attention of an encoder, a norm that only some members of the family use) has no place.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from deltatune.core.site import TRANSPOSED, Heads, Part


@dataclass(frozen=True)
class Packed:
    """One piece of a module that several roles share, e.g. `Packed("attn.c_attn", "q k v", "q")`.

    The pieces follow one another in the module's output; `by_head`, they follow one another within each head's share.
    """

    path: str
    layout: str
    piece: str
    by_head: bool = False

    def part(self, rows: int, heads: Heads) -> Part:
        """Return where the piece is among `rows` output features; `k` and `v` have the width of the key/value heads."""
        shares = {"q": heads.query, "k": heads.key, "v": heads.key}
        pieces = self.layout.split()
        groups = heads.query if self.by_head else 1
        unit = rows // groups // sum(shares.get(piece, 1) for piece in pieces)
        before = sum(shares.get(piece, 1) for piece in pieces[: pieces.index(self.piece)])
        return Part(groups, unit * before, unit * (before + shares.get(self.piece, 1)))


Role = str | Packed | tuple[str, ...]


@dataclass(frozen=True)
class Tower:
    """One stack of a family: its list of blocks, what is in a block, and the config fields that give its widths.

    `causal` may name a config field. A config without `kv_heads` has as many of them as heads; without `head_width`,
    heads share `width` equally.
    """

    blocks: str
    roles: Mapping[str, Role]
    embed: str
    causal: bool | str
    positions: Literal["rotary", "learned", "bias"]
    norms: tuple[str, ...] = ()
    name: str = ""
    prompt_at: int = 0
    width: str = "hidden_size"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_width: str = "head_dim"


@dataclass(frozen=True)
class Family:
    """A model family: its `config.model_type`s, its stacks, and the classes that store a weight as [d_in, d_out]."""

    types: tuple[str, ...]
    towers: tuple[Tower, ...]
    transposed: tuple[str, ...] = ()


@cache
def families() -> dict[str, Family]:
    """Return the family of every known model type; the first call imports the tables."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    defined = [value for module in modules for value in vars(module).values() if isinstance(value, Family)]
    TRANSPOSED.update(name for family in defined for name in family.transposed)
    return {model_type: family for family in defined for model_type in family.types}
