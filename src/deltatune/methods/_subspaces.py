"""The principal directions of a weight with its bias as one more column."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltatune.core.leaf import Given
from deltatune.core.site import Site


def subspaces(site: Site, own: Mapping[str, Tensor], size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the principal singular vectors of [W, b], U [d_out, r] and V^T [r, d_in + 1], without b where there is none.

    They come from a random projection that `seed` draws, so they are the same at every call (Halko et al., 2011).
    """
    given = Given(site, own)
    whole = torch.cat([given.weight, _bias(given)[:, None]], 1) if site.bias else given.weight
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        U, _, V = torch.svd_lowrank(whole, q=size)
    return U, V.mT


def _bias(given: Given) -> Tensor:
    bias = given.tensors.get("bias")
    if bias is None:
        return torch.zeros(given.site.d_out)
    whole = bias.detach().to("cpu", torch.float32)
    return whole if given.site.part is None else given.site.part.take(whole, 0)
