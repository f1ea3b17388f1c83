"""Sites: the places in a backbone where a delta can act, and the anatomy that names them.

An anatomy lists a backbone's stacks and, for every role, the modules that play it. `core` knows only what an anatomy
is; the tables for model families live in `deltatune.backbones` and register a resolver here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from deltatune.errors import DeltaTuneError

ROLES = (
    "embed", "block", "attn", "attn.q", "attn.k", "attn.v", "attn.o", "cross", "cross.q", "cross.k", "cross.v", "cross.o",
    "ffn", "ffn.gate", "ffn.up", "ffn.down", "norm", "head",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Rows `start:stop` of each of `groups` equal blocks of a packed module's output (GPT-2: 1 group; GPT-NeoX: one a head)."""

    groups: int
    start: int
    stop: int

    def take(self, x: Tensor, dim: int) -> Tensor:
        """Return this part of `x` along `dim`, flattened back to one dimension."""
        return (
            x.unflatten(dim, (self.groups, -1))
            .narrow(dim if dim < 0 else dim + 1, self.start, self.stop - self.start)
            .flatten(*_pair(dim))
        )

    def put(self, x: Tensor, new: Tensor, dim: int) -> Tensor:
        """Return `x` with this part along `dim` replaced by `new`."""
        wide = x.unflatten(dim, (self.groups, -1))
        inner = dim if dim < 0 else dim + 1
        size = wide.shape[inner]
        pieces = [
            wide.narrow(inner, 0, self.start),
            new.unflatten(dim, (self.groups, -1)),
            wide.narrow(inner, self.stop, size - self.stop),
        ]
        return torch.cat(pieces, inner).flatten(*_pair(dim))


def _pair(dim: int) -> tuple[int, int]:
    return (dim - 1, dim) if dim < 0 else (dim, dim + 1)


@dataclass(frozen=True)
class Heads:
    """Attention geometry: number of query heads, of key/value heads, and the width of one head."""

    query: int
    key: int
    width: int


@dataclass(frozen=True)
class Stack:
    """One tower of blocks: the path of their list, how many, how they attend and how positions are counted."""

    name: str
    path: str
    layers: int
    width: int
    causal: bool
    heads: Heads | None = None
    embed: str | None = None
    positions: Literal["rotary", "learned", "bias"] = "learned"
    prompt_at: int = 0


@dataclass(frozen=True)
class Place:
    """One module that plays one role: its path, the block it is in, and its part when several roles share the module.

    A sub-layer that no single module is begins at `path` and ends at `exit`.
    """

    role: str
    path: str
    stack: str = ""
    layer: int | None = None
    part: Part | None = None
    exit: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """What a backbone is made of: family name, stacks, and a place for every module that plays a role."""

    family: str
    stacks: tuple[Stack, ...] = ()
    places: tuple[Place, ...] = ()

    @property
    def blocks(self) -> list[Place]:
        """The places of the blocks, stack by stack, from the input to the output."""
        return [place for place in self.places if place.role == "block"]

    def stack(self, name: str) -> Stack:
        """Return the stack called `name`; raises `DeltaTuneError` when there is none."""
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise DeltaTuneError(f"{self.family} has no stack {name!r}; it has {[s.name for s in self.stacks]}.")


RESOLVERS: list[Callable[[nn.Module], Anatomy | None]] = []


def anatomy(model: nn.Module) -> Anatomy:
    """Return the anatomy of `model`, or one without roles when nothing knows it (address its modules by `path:`)."""
    for resolve in RESOLVERS:
        found = resolve(model)
        if found is not None:
            return found
    return Anatomy(family=type(model).__name__)


Kind = Literal["linear", "embedding", "conv", "grouped conv", "norm", "container"]
TRANSPOSED: set[str] = set()  # class names whose weight is stored [d_in, d_out]; backbones add theirs


@dataclass(frozen=True)
class Site:
    """One place that a where found: module, path, role, layer, side and widths; everything a method may know.

    `tensor` names one parameter of the module (for methods on tensors), of shape `shape`; `ties` are the other places
    that hold the very same parameter. `exit` is where a sub-layer ends that is not one module. `site.address` names the
    site in files.
    """

    role: str
    path: str
    stack: str = ""
    layer: int | None = None
    part: Part | None = None
    side: Literal["in", "out"] = "out"
    kind: Kind = "container"
    d_in: int = 0
    d_out: int = 0
    bias: bool = False
    transposed: bool = False
    heads: Heads | None = None
    tensor: str | None = None
    shape: tuple[int, ...] = ()
    ties: tuple[tuple[str, str], ...] = ()
    exit: str | None = None

    @property
    def width(self) -> int:
        """The width of the hidden state on this site's side."""
        return self.d_in if self.side == "in" else self.d_out

    def matrix(self, stored: Tensor) -> Tensor:
        """Return the module's stored weight as this site's W [d_out, d_in]: a table of embeddings transposed, a kernel flat."""
        W = stored.mT if self.transposed else stored.flatten(1) if stored.dim() > 2 else stored
        return W if self.part is None else self.part.take(W, 0)

    def stored(self, W: Tensor, before: Tensor) -> Tensor:
        """Return the stored weight `before` with W [d_out, d_in] in this site's place."""
        if self.part is not None:
            W = self.part.put(before.mT if self.transposed else before, W, 0)
        return W.mT if self.transposed else W.reshape(before.shape)

    @cached_property
    def address(self) -> str:
        """A name for this site, unique in its backbone and stable across processes."""
        part = f"[{self.role.rpartition('.')[2]}]" if self.part else ""
        return (
            f"{self.path or '/'}{part}"
            + (f"~{self.exit}" if self.exit else "")
            + (f".{self.tensor}" if self.tensor else "")
            + (":in" if self.side == "in" else "")
        )


def read_by(model: nn.Module, path: str) -> str | None:
    """Return the path of the module that reads this module's parameters and never calls it, or None when it is called.

    torch's attention reads its output projection so, with no call that a port could change.
    """
    parent, _, name = path.rpartition(".")
    inside = name == "out_proj" and isinstance(model.get_submodule(parent), nn.MultiheadAttention)
    return parent if inside else None


def is_transposed(module: nn.Module) -> bool:
    """Whether the module's weight is stored [d_in, d_out]."""
    return any(f"{c.__module__}.{c.__qualname__}" in TRANSPOSED for c in type(module).__mro__)


def describe(site: Site, module: nn.Module, width: int) -> Site:
    """Fill in what the module itself tells: its kind and its widths (`width` for containers, in features)."""
    if site.exit:
        return replace(site, kind="container", d_in=width, d_out=width)
    weight = module._parameters.get("weight")
    bias = module._parameters.get("bias") is not None
    if isinstance(module, nn.Embedding):
        sizes = {"d_in": module.num_embeddings, "d_out": module.embedding_dim}
        return replace(site, kind="embedding", transposed=True, **sizes)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        kind = "conv" if module.groups == 1 else "grouped conv"
        return replace(site, kind=kind, d_in=module.weight[0].numel(), d_out=module.out_channels, bias=bias)
    if weight is not None and weight.dim() == 1 and not list(module.children()):
        return replace(site, kind="norm", d_in=weight.numel(), d_out=weight.numel(), bias=bias)
    if is_transposed(module) and weight is not None:
        return _linear(site, weight.shape[0], weight.shape[1], bias, transposed=True)
    if isinstance(module, nn.Linear):
        return _linear(site, module.in_features, module.out_features, bias, transposed=False)
    if isinstance(module, nn.MultiheadAttention):
        width = module.embed_dim
    return replace(site, kind="container", d_in=width, d_out=width)


def _linear(site: Site, d_in: int, d_out: int, bias: bool, transposed: bool) -> Site:
    if site.part:
        d_out = site.part.groups * (site.part.stop - site.part.start)
    return replace(site, kind="linear", d_in=d_in, d_out=d_out, bias=bias, transposed=transposed)
