"""CPT: the examples of a prompt as a soft prompt that stays close to them (Blau et al., 2024, arXiv:2410.17222).

    X' = [E + proj(C); X]        C: [length, d], rows of label tokens fixed at 0
    proj(C)_i = C_i min(1, eps_i / |C_i|)        eps_i = (epsilon or format_epsilon) sqrt(d / 2048)

E holds the embeddings of the context's tokens `ids` and is stored; C starts at zero, so the context starts as it was
written. `types` says what each token is, modulo 4: 1 and 3 the template's words before input and output (`format_epsilon`),
2 input (`epsilon`), 0 label. `cpt()` makes both from texts. Projected gradient descent: the gradient is that of E + C, and
after every step C is projected. The paper's weights on the losses of older examples belong to the recipe and are left out.
Parameters: length d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import OnTokens
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._prompts import Tokens

KINDS = {"label": 0, "input template": 1, "input": 2, "output template": 3}


@dataclass(frozen=True)
class CPT(OnTokens):
    """Context-aware prompt: X' = [E + proj(C); X], E the embeddings of written examples (Blau et al., 2024)."""

    ids: tuple[int, ...] = (0,)
    types: tuple[int, ...] = ()
    epsilon: float = 0.1
    format_epsilon: float = 0.1

    where = "input.embed"
    breaks = {**OnTokens.breaks, "identity": "the context stands in front of the text from the first step on"}  # noqa: RUF012

    def __post_init__(self) -> None:
        if not self.ids or min(self.ids) < 0:
            raise DeltaTuneError(
                f"CPT(ids={self.ids}) has no context; write the ids of its tokens, or use cpt(tokenizer, parts)."
            )
        if self.types and len(self.types) != len(self.ids):
            raise DeltaTuneError(f"CPT has {len(self.ids)} ids and {len(self.types)} types; write one for each token.")
        if min(self.epsilon, self.format_epsilon) <= 0:
            raise DeltaTuneError("CPT's epsilons are the lengths that tokens may move by; write numbers above 0.")

    def leaves(self, site: Site) -> dict[str, Leaf]:
        shape = (len(self.ids), site.d_out)
        return {"E": Leaf(shape, Tokens(self.ids), trained=False, stored=True), "C": Leaf(shape)}

    def tokens(self, p: Any) -> Tensor:
        C = p.C * self._radius(p.C).ne(0)
        return p.E + C + (self._projected(C) - C).detach()

    def step(self, sites: list[Any], step: int, steps: int) -> list[dict[str, Tensor]]:
        return [{"C": self._projected(p.C)} for p in sites]

    def _projected(self, C: Tensor) -> Tensor:
        radius = self._radius(C)
        return C * (radius / torch.linalg.vector_norm(C, dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)

    def _radius(self, C: Tensor) -> Tensor:
        kinds = self.types or (1,) * len(self.ids)
        sizes = (0.0, self.format_epsilon, self.epsilon, self.format_epsilon)
        radius = torch.tensor([sizes[kind % 4] for kind in kinds], dtype=C.dtype, device=C.device)
        return radius[:, None] * (C.shape[1] / 2048) ** 0.5


def cpt(tokenizer: Callable[..., Any], parts: Iterable[tuple[str, str]], epsilon: float = 0.1) -> CPT:
    """Return the CPT of a context written as (kind, text) parts, e.g. ("input template", "Review: "), ("input", "Fine."), ...

    The kinds are `label`, `input template`, `input` and `output template`; raises `DeltaTuneError` for another one.
    """
    ids: list[int] = []
    kinds: list[int] = []
    for kind, text in parts:
        if kind not in KINDS:
            raise DeltaTuneError(f"there is no kind {kind!r} of text in a context; write one of {', '.join(KINDS)}.")
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += new
        kinds += [KINDS[kind]] * len(new)
    return CPT(tuple(ids), tuple(kinds), epsilon, epsilon)
