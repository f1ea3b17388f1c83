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
from deltatune.core.leaf import Init, KaimingUniform, Leaf, Normal, Uniform
from deltatune.errors import DeltaTuneError
from deltatune.methods._maps import Map

IDENTITY = {"identity": "the network's output is not the inner method's neutral start"}


@dataclass(frozen=True)
class MLPEncoder(Map):
    """Prompt encoder: P = relu(relu(E W_1^T + b_1) W_2^T + b_2) W_3^T + b_3 (Liu et al., 2021; as in peft)."""

    hidden: int = 128
    init: Init = Normal(1.0)

    breaks = IDENTITY

    def __post_init__(self) -> None:
        _check(self, self.hidden)

    def leaves(self, inner: dict[str, Leaf]) -> dict[str, Leaf]:
        name, (length, d) = _only(inner)
        widths = [d, self.hidden, self.hidden, d]
        layers = {}
        for i in (1, 2, 3):
            layers |= _linear(i, widths[i - 1], widths[i])
        return {f"E_{name}": Leaf((length, d), self.init), **layers}

    def unfold(self, p: Any) -> dict[str, Tensor]:
        name, E = _embedding(p)
        hidden = F.relu(F.linear(F.relu(F.linear(E, p.W1, p.b1)), p.W2, p.b2))
        return {name: F.linear(hidden, p.W3, p.b3)}


@dataclass(frozen=True)
class LSTMEncoder(Map):
    """Prompt encoder: P = relu(LSTM(E) W_1^T + b_1) W_2^T + b_2, the LSTM in both directions (Liu et al., 2021)."""

    hidden: int = 128
    layers_deep: int = 2
    init: Init = Normal(1.0)

    breaks = IDENTITY

    def __post_init__(self) -> None:
        _check(self, self.hidden, self.layers_deep)

    def leaves(self, inner: dict[str, Leaf]) -> dict[str, Leaf]:
        name, (length, d) = _only(inner)
        h, start = self.hidden, Uniform(self.hidden**-0.5)
        cells = {}
        for layer, way in self._cells():
            shapes = {"W": (4 * h, 2 * h if layer else d), "U": (4 * h, h), "b": (4 * h,), "c": (4 * h,)}
            cells |= {f"{leaf}_{layer}{way}": Leaf(shape, start) for leaf, shape in shapes.items()}
        head = {**_linear(1, 2 * h, 2 * h), **_linear(2, 2 * h, d)}
        return {f"E_{name}": Leaf((length, d), self.init), **cells, **head}

    def unfold(self, p: Any) -> dict[str, Tensor]:
        name, E = _embedding(p)
        leaves = vars(p)
        flat = [leaves[f"{leaf}_{layer}{way}"] for layer, way in self._cells() for leaf in "WUbc"]
        zero = E.new_zeros(2 * self.layers_deep, 1, self.hidden)
        y, _, _ = torch.lstm(E[None], (zero, zero), flat, True, self.layers_deep, 0.0, False, True, True)
        return {name: F.linear(F.relu(F.linear(y[0], p.W1, p.b1)), p.W2, p.b2)}

    def _cells(self) -> list[tuple[int, str]]:
        return [(layer, way) for layer in range(self.layers_deep) for way in ("f", "b")]


def p_tuning(length: int = 20, hidden: int = 128, encoder: str = "LSTMEncoder") -> Delta:
    """A soft prompt through a prompt encoder: `LSTMEncoder`, the paper's, or `MLPEncoder` (Liu et al., 2021)."""
    return parse(f"Reparam(PromptTuning(length={length}), {encoder}(hidden={hidden}))")


def _linear(i: int, d_in: int, d_out: int) -> dict[str, Leaf]:
    return {f"W{i}": Leaf((d_out, d_in), KaimingUniform()), f"b{i}": Leaf((d_out,), Uniform(d_in**-0.5))}


def _embedding(p: Any) -> tuple[str, Tensor]:
    return next((leaf[2:], tensor) for leaf, tensor in vars(p).items() if leaf.startswith("E_"))


def _only(inner: dict[str, Leaf]) -> tuple[str, tuple[int, ...]]:
    """Return the name and the shape of a method's only leaf."""
    (name, leaf), *more = inner.items()
    if more or len(leaf.shape) != 2:
        shapes = {name: leaf.shape for name, leaf in inner.items()}
        raise DeltaTuneError(
            f"a prompt encoder makes one leaf of shape [length, d], as of PromptTuning; found {shapes}. MLP() makes several."
        )
    return name, leaf.shape


def _check(encoder: Map, *sizes: int) -> None:
    if min(sizes) < 1:
        raise DeltaTuneError(f"{encoder} cannot be built; write sizes of at least 1.")
