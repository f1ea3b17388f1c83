"""Open or closed loop: whether what a method adds depends on the state that it is added to, found by trying.

    u(x) = what comes out with the method minus what comes out without, at the method's own place

    open loop            u does not depend on x: a constant (BitFit), extra tokens, keys and values
    linear feedback      u(x) - u(0) is linear in x: LoRA
    nonlinear feedback   neither: an adapter

(The mapping of methods to controllers: Ding et al., 2022, section 4.2.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.core.attach import Attachment
from deltatune.core.delta import Placement
from deltatune.core.leaves import tensors_of
from deltatune.core.site import Site
from deltatune.core.stored import Values
from deltatune.core.walk import submodule
from deltatune.theory.sides import restored

Loop = Literal["open", "linear", "nonlinear"]
Added = tuple[int, Callable[[Tensor], Tensor]]
ORDER: list[Loop] = ["open", "linear", "nonlinear"]
TOKENS = 5  # of the states that are tried
AT = torch.arange(TOKENS)[None]


def loops(attachment: Attachment) -> dict[str, Loop]:
    """Return the kind of loop of every term of an attached delta, by its text: the widest that is found at its places.

    The trained leaves are moved by a little noise while it is tried: a method that adds nothing yet shows no loop.
    """
    found: dict[str, Loop] = {}
    tried = {(p.term, p.site.role, p.site.side, p.site.tensor): p for p in attachment.placements}
    for (term, *_), placement in tried.items():
        text = str(attachment.delta.terms[term])
        found[text] = max(found.get(text, "open"), loop_of(attachment, placement), key=ORDER.index)
    return found


@torch.no_grad()
def loop_of(attachment: Attachment, placement: Placement) -> Loop:
    """Return the kind of loop of one method at one site."""
    module, method = submodule(attachment.model, placement.site.path), placement.method
    with _moved(attachment, placement) as p:
        width, added = ADDED[method.acts](method.computes, placement.site, p, module)
        generator = torch.Generator().manual_seed(0)
        x, z = (torch.randn(1, TOKENS, width, generator=generator, dtype=torch.float64) for _ in range(2))
        zero, ux, uz, both = added(0 * x), added(x), added(z), added(2 * x - 3 * z)
    if torch.allclose(ux, uz, rtol=1e-9, atol=1e-12):
        return "open"
    linear = torch.allclose(both - zero, 2 * (ux - zero) - 3 * (uz - zero), rtol=1e-6, atol=1e-9)
    return "linear" if linear else "nonlinear"


@contextmanager
def _moved(attachment: Attachment, placement: Placement) -> Iterator[Any]:
    """The scope in which the method's trained leaves are moved; its tensors in double precision."""
    tensors, generator = tensors_of(placement, attachment.leaves), torch.Generator().manual_seed(1)
    moved = [tensor for tensor in tensors.live().values() if tensor.is_floating_point()]
    with restored(moved):
        for tensor in moved:
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.requires_grad else 0
        yield tensors(torch.float64)


def _linear(method: Any, site: Site, p: Any, module: nn.Module) -> Added:
    theta, b = Values(module)["weight"].double(), torch.zeros(site.d_out, dtype=torch.float64)
    if site.kind == "norm":  # such a method changes a norm's bias alone
        shift = method.bias(p, b) - b
        return site.d_out, lambda x: shift.expand(*x.shape[:-1], -1)
    W = site.matrix(theta)
    if site.kind == "linear":
        base = SimpleNamespace(weight=W, bias=None, plain=None)
        return site.d_in, lambda x: method.output(p, x, x @ W.mT, base) - x @ W.mT
    change = method.weight(p, W) - W
    return site.d_in, lambda x: x @ change.mT


def _tensor(method: Any, site: Site, p: Any, module: nn.Module) -> Added:
    theta = Values(module)[site.tensor or "weight"].double()
    change = method.value(p, theta) - theta
    width = change.shape[-1]
    if site.tensor == "bias":
        return width, lambda x: change.expand(*x.shape[:-1], -1)
    if change.dim() == 1:
        return width, lambda x: x * change
    return width, lambda x: x @ change.flatten(0, -2).mT


def _attended(method: Any, site: Site, p: Any, module: nn.Module) -> Added:
    heads: Any = site.heads
    shape, generator = (heads.query, heads.width), torch.Generator().manual_seed(2)
    maps = torch.randn(2, heads.query * heads.width, site.width, generator=generator, dtype=torch.float64)

    def by_head(x: Tensor, m: Tensor) -> Tensor:
        return (x @ m.mT).unflatten(-1, shape).movedim(-2, -3)

    def project(h: Tensor) -> tuple[Tensor, Tensor]:
        return by_head(h, maps[0]), by_head(h, maps[1])

    return site.width, lambda x: method.attend(p, by_head(x, maps[0]), project)


def _nothing(method: Any, site: Site, p: Any, module: nn.Module) -> Added:
    # Extra tokens, keys and values are the same whatever the state is.
    return 1, torch.zeros_like


def _branch(method: Any, site: Site, p: Any, module: nn.Module) -> Added:
    return site.d_in, lambda x: method.output(p, x, x.new_zeros(*x.shape[:-1], site.d_out))


# What a method adds at its own place to a state of some width, by its interface.
ADDED: dict[str, Callable[[Any, Site, Any, nn.Module], Added]] = {
    "linear": _linear,
    "tensor": _tensor,
    "queries": _attended,
    "heads": _nothing,
    "tokens": _nothing,
    "branch": _branch,
    "stream": lambda method, site, p, module: (site.width, lambda h: method.stream(p, h) - h),
    "positions": lambda method, site, p, module: (site.width, lambda h: method.stream(p, h, AT) - h),
    "ladder": lambda method, site, p, module: (site.width, lambda h: method.top(p, h, method.rung(p, h, None)) - h),
}
