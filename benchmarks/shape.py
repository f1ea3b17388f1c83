"""What is measured, in numbers: how many rounds, on which device, and how large the model is.

Nothing here needs more than torch and transformers, so that other environments build the same models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Clock, Turn, take_turns


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How long to measure, and where: what every benchmark has. Its own sizes are fields of a subclass."""

    rounds: int
    device: str = "cpu"

    def turns(self, contestants: Mapping[str, Turn], rounds: int | None = None) -> dict[str, Clock]:
        """Let the contestants take turns on the device; `rounds` may be fewer for what takes long."""
        return take_turns(contestants, rounds or self.rounds, self.device)

    def sizes(self) -> dict[str, Any]:
        """Return what is measured as JSON, without how and where."""
        return {name: value for name, value in asdict(self).items() if name not in ("rounds", "device")}


@dataclass(frozen=True, kw_only=True)
class LlamaShape(Shape):
    """A Llama of some size, its values in some float type."""

    layers: int
    width: int
    ffn: int
    heads: int
    vocabulary: int = 1000
    dtype: str = "float32"

    def model(self, layers: int | None = None) -> nn.Module:
        """Build the model on the device, always the same, in training mode; with another number of layers where asked."""
        with torch.device(self.device):
            model = llama(layers or self.layers, self.width, self.ffn, self.heads, self.vocabulary)
        return model.train().to(getattr(torch, self.dtype))

    def ids(self, rows: int, tokens: int) -> Tensor:
        """Return token ids [rows, tokens] on the device, always the same."""
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(0, self.vocabulary, (rows, tokens), generator=generator).to(self.device)


def llama(layers: int, width: int, ffn: int, heads: int, vocabulary: int = 1000) -> nn.Module:
    """Build a Llama of this shape with the same random values each time, in fp32, its key/value cache off."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)
