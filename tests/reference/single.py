"""One linear layer by itself: the cheapest model on which a method can be compared with peft's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from tests.laws.cases import busy

D_IN, D_OUT = 24, 20
PLACE = "path:layer"


class Single(nn.Module):
    """x -> linear(x)."""

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(d_in, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def single(d_in: int = D_IN, d_out: int = D_OUT, bias: bool = True) -> Single:
    """Return a seeded `Single` in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Single(d_in, d_out, bias).eval()


def peft_single(config: Any, d_in: int = D_IN, d_out: int = D_OUT, bias: bool = True) -> Any:
    """Return peft's layer around the linear of `single`."""
    from peft import get_peft_model

    return get_peft_model(single(d_in, d_out, bias), config).eval().base_model.model.layer


def leaves_of(model: nn.Module, weights: dt.Weights) -> dict[str, Tensor]:
    """Return every leaf of a delta of one method at one site as it is when attached, untrained ones included."""
    with dt.attach(model, weights) as attachment:
        return {name.rpartition(".")[2]: tensor.detach().clone() for name, tensor in attachment.named_tensors()}


def started(method: Any, size: float = 0.2, **shape: Any) -> tuple[Single, dt.Weights]:
    """Return `single` and weights of a method for it, with the trained tensors moved by noise of `size`."""
    model = single(**shape)
    return model, busy(dt.init(method.at(PLACE), model), seed=3, size=size)


def inputs(d_in: int = D_IN) -> Tensor:
    """Return a seeded batch [5, d_in]."""
    return torch.randn(5, d_in, generator=torch.Generator().manual_seed(8))


def assert_same(model: nn.Module, weights: dt.Weights, layer: Any, tolerance: float = 1e-5) -> None:
    """Assert that the attached and the merged model compute what peft's layer does, and not what the bare one does."""
    x = inputs(layer.in_features)
    bare = model(x)
    with torch.no_grad():
        with dt.attach(model, weights):
            ours = model(x)
        assert (ours - bare).abs().max() > 1e-2
        torch.testing.assert_close(ours, layer(x), rtol=0, atol=tolerance)
        with dt.merge_(model, weights):
            torch.testing.assert_close(model(x), ours, rtol=0, atol=tolerance)
