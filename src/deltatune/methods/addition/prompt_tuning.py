"""Prompt tuning: trained input embeddings in front of the text (Lester et al., 2021, arXiv:2104.08691).

    X' = [P; X]        P: [length, d]

P starts as rows of the backbone's vocabulary (`Vocabulary()`), as the embeddings of a text (`Text("...")`), or at random
(`Uniform(0.5)`). Parameters: length d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.leaf import Init, Leaf
from deltatune.core.method import OnTokens
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._prompts import Vocabulary


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
