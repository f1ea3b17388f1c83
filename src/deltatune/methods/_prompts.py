"""Starts of soft prompts that come from the backbone's table of embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given, Init, Shape
from deltatune.errors import DeltaTuneError


def rows(given: Given, ids: Tensor) -> Tensor:
    """Return rows of the site's table as float32 on the CPU."""
    table = given.tensors["weight"]
    return table[ids.to(table.device)].detach().to("cpu", torch.float32)


@dataclass(frozen=True)
class Vocabulary(Init):
    """Rows drawn at random from the first `most` rows of the vocabulary, the most frequent ones in most tokenizers."""

    most: int = 5000

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        most = min(self.most, given.tensors["weight"].shape[0])
        return rows(given, torch.randint(0, most, (shape[0],), generator=generator))


@dataclass(frozen=True)
class Text(Init):
    """The embeddings of a text, repeated or cut to the length of the prompt; needs the backbone's tokenizer as evidence."""

    text: str

    needs = frozenset({"tokenizer"})

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        ids = given.evidence["tokenizer"](self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DeltaTuneError(f"the tokenizer makes no token of {self.text!r}; write a text with words.")
        return rows(given, torch.tensor([ids[i % len(ids)] for i in range(shape[0])]))


@dataclass(frozen=True)
class Tokens(Init):
    """The embeddings of the tokens `ids`."""

    ids: tuple[int, ...]

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        size = given.tensors["weight"].shape[0]
        if max(self.ids) >= size:
            raise DeltaTuneError(
                f"there is no token {max(self.ids)} in this vocabulary of {size}; was it another tokenizer?"
            )
        return rows(given, torch.tensor(self.ids))
