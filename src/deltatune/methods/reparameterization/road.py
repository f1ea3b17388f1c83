"""RoAd: the output of a layer is rotated and scaled in planes (Liao and Monz, 2024, arXiv:2409.00119).

    f'(x) = R f(x)        (z_i, z_j)' = [[a_1 cos t_1, -b_1 sin u_1], [b_2 sin u_2, a_2 cos t_2]] (z_i, z_j)

for every pair i, j = i + group / 2 of each group of outputs. Variant 1 has one angle and one scale a pair (t_1 = t_2 =
u_1 = u_2, a_1 = a_2 = b_1 = b_2), variant 2 one of each a row, variant 4 one of each an entry. Angles start at zero and
scales at one, so the delta starts neutral. Parameters: variant d_out a site.

Both learn `rate` times as fast as the recipe says; the default is ours, chosen on dev data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from deltatune.core.leaf import Leaf, Ones
from deltatune.core.method import Base, OnLinear
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_divides, check_least, fitting

LARGEST = 64  # the size that a group has by default where the width allows it
ROWS = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # (columns, rows) of each 2 x 2 matrix that have values of their own


@dataclass(frozen=True)
class RoAd(OnLinear):
    """2D rotary adaptation: f'(x) = R f(x) with R scaled rotations in planes (Liao and Monz, 2024)."""

    variant: Literal[1, 2, 4] = 1
    group: int | None = None
    rate: float = 30.0

    where = "{attn.{q,v},cross.{q,v}?}"

    def __post_init__(self) -> None:
        check_least(self, 2, group=2 if self.group is None else self.group)
        if self.variant not in ROWS:
            raise DeltaTuneError(f"there is no RoAd(variant={self.variant}); write variant=1, 2 or 4.")
        if (self.group or 0) % 2:
            raise DeltaTuneError(f"RoAd(group={self.group}) leaves an output without a partner; write an even group.")

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_divides(self, "group", self._size(site.d_out), site.d_out, site)
        size = (self.variant * site.d_out // 2,)
        return {"angle": Leaf(size, rate=self.rate), "scale": Leaf(size, Ones(), rate=self.rate)}

    def weight(self, p: Any, W: Tensor) -> Tensor:
        return self._turned(p, W.mT).mT

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        return None if b is None else self._turned(p, b)

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        return self._turned(p, y)

    def _size(self, width: int) -> int:
        return self.group or fitting(LARGEST, width, multiple=2)

    def _turned(self, p: Any, z: Tensor) -> Tensor:
        half = self._size(z.shape[-1]) // 2
        angle, scale = (
            leaf.to(z.dtype).view(-1, *ROWS[self.variant], half).expand(-1, 2, 2, half) for leaf in (p.angle, p.scale)
        )
        cos, sin = (scale[:, 0] * angle[:, 0].cos()), (scale[:, 1] * angle[:, 1].sin())
        pairs = z.unflatten(-1, (-1, 2, half))
        across = torch.stack((-pairs[..., 1, :], pairs[..., 0, :]), -2)
        return (pairs * cos + across * sin).flatten(-3)
