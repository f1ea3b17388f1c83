"""Adapter: a bottleneck behind a sub-layer (Houlsby et al., 2019, arXiv:1902.00751).

    h' = h + f(h D^T + d) U^T + u        D: [size, d]   d: [size]   U: [d, size]   u: [d]

D starts N(0, 0.01^2) and U at zero, so that the delta starts exactly neutral; the paper starts both near zero
(`up=Normal(0.001)`). Biases start at zero. Parameters: 2 d size + size + d a site. Houlsby, Pfeiffer and AdapterDrop
are places of it: `houlsby()`, `pfeiffer()`, `adapterdrop()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltatune.core.delta import Delta
from deltatune.core.leaf import Init, Leaf, Normal, Zeros
from deltatune.core.method import OnStream
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._activations import ACTIVATIONS, check_activation
from deltatune.methods._low_rank import affine


@dataclass(frozen=True)
class Adapter(OnStream):
    """Bottleneck adapter: h' = h + f(h D^T + d) U^T + u (Houlsby et al., 2019)."""

    size: int = 64
    activation: str = "gelu"
    down: Init = Normal(0.01)
    up: Init = Zeros()

    where = "{attn.o,cross.o?,ffn.down}:out"
    batched = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DeltaTuneError(f"Adapter(size={self.size}) has no bottleneck; write a size of at least 1.")
        check_activation(self.activation)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        d, m = site.width, self.size
        return {"D": Leaf((m, d), self.down), "d": Leaf((m,)), "U": Leaf((d, m), self.up), "u": Leaf((d,))}

    def stream(self, p: Any, h: Tensor) -> Tensor:
        return h + affine(ACTIVATIONS[self.activation](affine(h, p.D, p.d)), p.U, p.u)


def houlsby(size: int = 64) -> Delta:
    """Two adapters a block, behind attention and behind the FFN (Houlsby et al., 2019)."""
    return Adapter(size).at("{attn.o,cross.o?,ffn.down}:out")


def pfeiffer(size: int = 48) -> Delta:
    """One adapter a block, behind the FFN (Pfeiffer et al., 2021)."""
    return Adapter(size, "relu").at("ffn.down:out")


def adapter_plus(size: int = 8) -> Delta:
    """One adapter a block behind the FFN, whose channel scale is part of U (Adapter+: Steitz and Roth, 2024, arXiv:2406.06820)."""
    return Adapter(size).at("ffn.down:out")


def adapterdrop(size: int = 64, first: int = 5) -> Delta:
    """Houlsby's places without the first blocks of every stack (Rueckle et al., 2021)."""
    return Adapter(size).at(f"{{attn.o[{first}:],cross.o[{first}:]?,ffn.down[{first}:]}}:out")
