"""Ladder side-tuning: a small network beside the backbone, which no gradient enters (Sung et al., 2022, arXiv:2206.06522).

    h' = h + s U^T behind the last block                     U: [d_h, m], one a stack
    s' = g s + (1 - g) (h D^T + d)                           D: [m, d_h]   m = d_h / reduction
    s'' = s' + relu(norm(s') W_1^T + b_1) W_2^T + b_2        W_1: [4 m, m]   W_2: [m, 4 m]
    g = sigmoid(alpha / temperature)                         alpha: [1], a site

h is a block's output and s = 0 before the first rung. Rungs are pointwise, so that generation needs no second cache; the
paper's rungs are whole blocks, pruned from the backbone's. norm is the root-mean-square norm without a gain. alpha and U
start at zero, so the delta starts neutral; D, W_1 and W_2 start uniform (Kaiming). Parameters: m d_h + 8 m^2 + 6 m + 1 a
site, and m d_h a stack.

In an encoder-decoder the encoder's ladder is read by the decoder, and its gradient goes through the decoder's
attention; `.at("decoder.block")` keeps all gradients out of the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Init, KaimingUniform, Leaf
from deltatune.core.method import OnLadder
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class LadderSideTuning(OnLadder):
    """Ladder: s' = g s + (1 - g) Down(h), s'' = s' + f(s'), and h + Up(s) at the top (Sung et al., 2022)."""

    reduction: int = 8
    temperature: float = 0.1
    init: Init = KaimingUniform()

    where = "block"

    def __post_init__(self) -> None:
        check_least(self, reduction=self.reduction)
        if self.temperature <= 0:
            raise DeltaTuneError(
                f"LadderSideTuning(temperature={self.temperature}) must be above 0; the paper has 0.1."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        m = site.d_out // self.reduction
        if m < 1:
            raise DeltaTuneError(
                f"LadderSideTuning(reduction={self.reduction}) leaves nothing of the width {site.d_out} of {site.path!r}; "
                f"write a reduction of at most {site.d_out}."
            )
        rung = {"alpha": Leaf((1,)), "D": Leaf((m, site.d_out), self.init), "d": Leaf((m,))}
        inner = {"W1": Leaf((4 * m, m), self.init), "b1": Leaf((4 * m,)), "W2": Leaf((m, 4 * m), self.init)}
        return {**rung, **inner, "b2": Leaf((m,)), f"U{site.stack}": Leaf((site.d_out, m), scope="delta")}

    def rung(self, p: Any, h: Tensor, s: Tensor | None) -> Tensor:
        h = h.detach()
        g = torch.sigmoid(p.alpha / self.temperature)
        down = (1 - g) * F.linear(h, p.D, p.d)
        s = down if s is None else g * s + down
        return s + F.linear(F.relu(F.linear(F.rms_norm(s, s.shape[-1:]), p.W1, p.b1)), p.W2, p.b2)

    def top(self, p: Any, h: Tensor, s: Tensor) -> Tensor:
        return h + F.linear(s, next(tensor for name, tensor in vars(p).items() if name.startswith("U")))
