"""P-tuning: a soft prompt that a small network computes while it is trained (Liu et al., 2021, arXiv:2103.10385).

    P = relu(LSTM(E) W_1^T + b_1) W_2^T + b_2                     LSTMEncoder, the paper's
    P = relu(relu(E W_1^T + b_1) W_2^T + b_2) W_3^T + b_3         MLPEncoder, what most use now

E: [length, d]; the LSTM reads E in both directions, [hidden] each way, in two layers. E starts N(0, 1), the networks
uniform (Kaiming). `p_tuning()` is `Reparam(PromptTuning(), through=...)`; `flatten` then leaves the network behind.
Parameters, with h = hidden: length d + h d + h^2 + d h + 2 h + d (MLP); length d + 8 h (d + h + 2) + 8 h (3 h + 2)
+ 4 h^2 + 2 h + 2 h d + d (LSTM of two layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltatune.core.delta import Delta, parse
from deltatune.core.leaf import Init, Leaf, Normal, Uniform
from deltatune.methods._encoders import IDENTITY, check, embedding, linear, only
from deltatune.methods._maps import Map


@dataclass(frozen=True)
class MLPEncoder(Map):
    """Prompt encoder: P = relu(relu(E W_1^T + b_1) W_2^T + b_2) W_3^T + b_3 (Liu et al., 2021; as in peft)."""

    hidden: int = 128
    init: Init = Normal(1.0)

    breaks = IDENTITY

    def __post_init__(self) -> None:
        check(self, self.hidden)

    def leaves(self, inner: dict[str, Leaf]) -> dict[str, Leaf]:
        name, (length, d) = only(inner)
        widths = [d, self.hidden, self.hidden, d]
        layers = {}
        for i in (1, 2, 3):
            layers |= linear(i, widths[i - 1], widths[i])
        return {f"E_{name}": Leaf((length, d), self.init), **layers}

    def unfold(self, p: Any) -> dict[str, Tensor]:
        name, E = embedding(p)
        hidden = F.relu(F.linear(F.relu(F.linear(E, p.W1, p.b1)), p.W2, p.b2))
        return {name: F.linear(hidden, p.W3, p.b3)}


@dataclass(frozen=True)
class LSTMEncoder(Map):
    """Prompt encoder: P = relu(LSTM(E) W_1^T + b_1) W_2^T + b_2, the LSTM in both directions (Liu et al., 2021)."""

    hidden: int = 128
    depth: int = 2
    init: Init = Normal(1.0)

    breaks = IDENTITY

    def __post_init__(self) -> None:
        check(self, self.hidden, self.depth)

    def leaves(self, inner: dict[str, Leaf]) -> dict[str, Leaf]:
        name, (length, d) = only(inner)
        h, start = self.hidden, Uniform(self.hidden**-0.5)
        cells = {}
        for layer, way in self._cells():
            shapes = {"W": (4 * h, 2 * h if layer else d), "U": (4 * h, h), "b": (4 * h,), "c": (4 * h,)}
            cells |= {f"{leaf}_{layer}{way}": Leaf(shape, start) for leaf, shape in shapes.items()}
        head = {**linear(1, 2 * h, 2 * h), **linear(2, 2 * h, d)}
        return {f"E_{name}": Leaf((length, d), self.init), **cells, **head}

    def unfold(self, p: Any) -> dict[str, Tensor]:
        name, E = embedding(p)
        leaves = vars(p)
        flat = [leaves[f"{leaf}_{layer}{way}"] for layer, way in self._cells() for leaf in "WUbc"]
        zero = E.new_zeros(2 * self.depth, 1, self.hidden)
        y, _, _ = torch.lstm(E[None], (zero, zero), flat, True, self.depth, 0.0, False, True, True)
        return {name: F.linear(F.relu(F.linear(y[0], p.W1, p.b1)), p.W2, p.b2)}

    def _cells(self) -> list[tuple[int, str]]:
        return [(layer, way) for layer in range(self.depth) for way in ("f", "b")]


def p_tuning(length: int = 20, hidden: int = 128, encoder: str = "LSTMEncoder") -> Delta:
    """A soft prompt through a prompt encoder: `LSTMEncoder`, the paper's, or `MLPEncoder` (Liu et al., 2021)."""
    return parse(f"Reparam(PromptTuning(length={length}), {encoder}(hidden={hidden}))")
