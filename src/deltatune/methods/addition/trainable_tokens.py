"""Trainable tokens: the embeddings of a few tokens are trained (peft, 2025; no paper).

    E'[tokens[i]] = rows[i]        other rows as they are   E: [vocabulary, d]   rows: [len(tokens), d]

rows start as the backbone's own, so the delta starts neutral. A token below 0 counts from the end of the vocabulary, so
the default is the token added last. The head's rows are trained too, and a head tied to the embedding has the same ones;
`.at("embed")` leaves the head as it is. Parameters: len(tokens) d at a table, and len(tokens) at a head's bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape
from deltatune.core.method import OnTensor
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class Rows(Init):
    """The rows of the site's own tensor that belong to `tokens`."""

    tokens: tuple[int, ...]

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        return given.theta[list(self.tokens)]


@dataclass(frozen=True)
class TrainableTokens(OnTensor):
    """Trained rows of the embedding: E'[tokens[i]] = rows[i] (peft's TRAINABLE_TOKENS)."""

    tokens: tuple[int, ...] = (-1,)

    where = "{embed,head?}"
    kinds = ("embedding", "linear")

    def __post_init__(self) -> None:
        if not self.tokens:
            raise DeltaTuneError("TrainableTokens(tokens=()) trains no token; write their ids, e.g. tokens=(5, 17).")

    def leaves(self, site: Site) -> dict[str, Leaf]:
        rows = site.shape[0]
        for token in self.tokens:
            if not -rows <= token < rows:
                raise DeltaTuneError(f"there is no token {token} in {site.path!r}, which has {rows}: 0 to {rows - 1}.")
        if len({token % rows for token in self.tokens}) < len(self.tokens):
            raise DeltaTuneError(f"TrainableTokens(tokens={self.tokens}) names a token twice; write each once.")
        return {"rows": Leaf((len(self.tokens), *site.shape[1:]), Rows(self.tokens))}

    def value(self, p: Any, theta: Tensor) -> Tensor:
        index = torch.tensor([token % theta.shape[0] for token in self.tokens], device=theta.device)
        return theta.index_copy(0, index, p.rows.to(theta.dtype))
