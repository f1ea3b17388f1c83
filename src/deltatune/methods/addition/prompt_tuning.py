"""Prompt tuning: trained input embeddings in front of the text (Lester et al., 2021, arXiv:2104.08691).

    X' = [P; X]        P: [length, d]

P starts as rows of the backbone's vocabulary (`Vocabulary()`), as the embeddings of a text (`Text("...")`), or at random
(`Uniform(0.5)`). Parameters: length d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Leaf, Shape
from deltatune.core.method import OnTokens
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class Vocabulary(Init):
    """Rows drawn at random from the first `most` rows of the vocabulary, the most frequent ones in most tokenizers."""

    most: int = 5000

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        table = given.tensors["weight"]
        rows = torch.randint(0, min(self.most, table.shape[0]), (shape[0],), generator=generator)
        return table[rows.to(table.device)].detach().to("cpu", torch.float32)


@dataclass(frozen=True)
class Text(Init):
    """The embeddings of a text, repeated or cut to the length of the prompt; needs the backbone's tokenizer as evidence."""

    text: str

    needs = frozenset({"tokenizer"})

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        ids = given.evidence["tokenizer"](self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DeltaTuneError(f"the tokenizer makes no token of {self.text!r}; write a text with words.")
        table = given.tensors["weight"]
        rows = torch.tensor([ids[i % len(ids)] for i in range(shape[0])])
        return table[rows.to(table.device)].detach().to("cpu", torch.float32)


@dataclass(frozen=True)
class PromptTuning(OnTokens):
    """Soft prompt: X' = [P; X] at the input of a stack (Lester et al., 2021)."""

    length: int = 100
    init: Init = Vocabulary()

    where = "input.embed"
    breaks = {**OnTokens.breaks, "identity": "tokens in front of the text take attention from the first step on"}  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DeltaTuneError(f"PromptTuning(length={self.length}) has no tokens; write a length of at least 1.")

    def leaves(self, site: Site) -> dict[str, Leaf]:
        return {"P": Leaf((self.length, site.d_out), self.init)}

    def tokens(self, p: Any) -> Tensor:
        return p.P
