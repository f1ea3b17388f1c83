"""Models of one module that is no called linear layer, for the tests of places beyond linear layers."""

from __future__ import annotations

import torch
from torch import nn

from tests import tiny

VOCABULARY, WIDTH, LENGTH = 40, 24, 5


class Over(nn.Module):
    """A model of one module, `only`."""

    def __init__(self, only: nn.Module) -> None:
        super().__init__()
        self.only = only

    def forward(self, x):
        return self.only(x)


class Attending(Over):
    """Self-attention of torch, whose output projection is read and not called."""

    def forward(self, x):
        return self.only(x, x, x, need_weights=False)[0]


def embedding(**given):
    return tiny.seeded(lambda: Over(nn.Embedding(VOCABULARY, WIDTH, **given)))


def convolution(dims=2, **given):
    made = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return tiny.seeded(lambda: Over(made(4, WIDTH, tuple(range(1, dims + 1)), padding=1, **given)))


def attention(**given):
    return tiny.seeded(lambda: Attending(nn.MultiheadAttention(WIDTH, 2, batch_first=True, **given)))


def example(model):
    generator = torch.Generator().manual_seed(4)
    dtype = next(model.parameters()).dtype
    if isinstance(model.only, nn.Embedding):
        return torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)
    if isinstance(model.only, nn.MultiheadAttention):
        return torch.randn(2, LENGTH, WIDTH, generator=generator).to(dtype)
    sizes = [4] * (model.only.weight.dim() - 2)
    return torch.randn(2, 4, *sizes, generator=generator).to(dtype)


PLACES = {
    "embedding": (embedding, "path:only"),
    "conv": (convolution, "path:only"),
    "out_proj": (attention, "path:only.out_proj"),
}
