"""Random modules: a method at a random part of the backbone's modules (Ding et al., 2022, section 5.3).

    S = a random subset of the sites of `where`, max(1, round(share n)) of n;   delta = method at S

The study fine-tunes them: `random_modules(model, Full())`; it found that such choices matter less in larger backbones.
Parameters: those of the method at the sites chosen.
"""

from __future__ import annotations

import torch
from torch import Generator, nn

from deltatune.core.delta import Delta, Term
from deltatune.core.method import Method
from deltatune.core.site import Site, anatomy
from deltatune.core.where import select
from deltatune.errors import DeltaTuneError

EVERY = "{attn.{q,k,v,o},cross.{q,k,v,o}?,ffn.{gate?,up,down},norm?}"


def random_modules(model: nn.Module, method: Method, where: str = EVERY, share: float = 0.1, seed: int = 0) -> Delta:
    """Return the delta of `method` at a random share of the sites of `where` (Ding et al., 2022); the seed says which."""
    if not 0 < share <= 1:
        raise DeltaTuneError(
            f"share={share} is no share of the modules; write one above 0 and up to 1, e.g. share=0.1."
        )
    whole = method.acts == "tensor"  # such a method takes packed roles together, as the one module they are
    places = list(dict.fromkeys(_alone(site, whole) for site in select(model, where, anatomy(model))))
    order = torch.randperm(len(places), generator=Generator().manual_seed(seed))
    chosen = sorted(order[: max(1, round(share * len(places)))].tolist())
    return Delta(tuple(Term(places[i], method) for i in chosen))


def _alone(site: Site, whole: bool) -> str:
    """Return the where that finds this site and no other, or the whole module it is a part of."""
    side = ":in" if site.side == "in" else ""
    if site.part is None or whole:
        return f"path:{site.path}{side}"
    stack = f"{site.stack}." if site.stack else ""
    return f"{stack}{site.role}[{site.layer}]{side}"
