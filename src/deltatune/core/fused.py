"""Fused training paths: computations with a backward of their own, which keep less for it than their parts would.

A delta's gradient needs the input of the layer it sits at, and often nothing else does: the backbone is frozen. Such an
input is a cheap function of what autograd keeps anyway (the input of a norm, the two halves of a gated product), so it is
computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F

Make = Callable[[], Tensor]


def eager() -> bool:
    """Whether operations run as they are written, and neither a compiler nor `torch.func` looks on."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def recorded() -> bool:
    """Whether gradients are recorded in the ordinary way; a compiler, `torch.func` and forward mode take the plain path."""
    return torch.is_grad_enabled() and eager() and forward_ad._current_level < 0


def fusible() -> bool:
    """Whether a method may take its fused path, as `recorded` says; who is `noting` hears of it."""
    fused = recorded()
    for note in _notes:
        note(fused)
    return fused


_notes: list[Callable[[bool], None]] = []


@contextmanager
def noting(note: Callable[[bool], None]) -> Iterator[None]:
    """The scope in which `note` hears of every choice between the fused path (True) and the plain one."""
    _notes.append(note)
    try:
        yield
    finally:
        _notes.remove(note)


def own(y: Tensor) -> bool:
    """Whether a function may write over a layer's output: it lies in one piece and is no view, whose base would have to follow."""
    return y.is_contiguous() and not y._is_view()


def added(y: Tensor, b: Tensor) -> Tensor:
    """Return y + b, in place of a layer's output y where that is its own."""
    return y.add_(b) if eager() and own(y) and y.dtype == b.dtype else y + b


@dataclass
class Shared:
    """What the users of one tensor share in a backward pass: how many are still to come, and the tensor between them."""

    users: int = 0
    value: Tensor | None = None


@dataclass
class Remake:
    """A tensor of the graph that is computed again, for one of its users."""

    make: Make
    shared: Shared

    @property
    def released(self) -> bool:
        """Whether nobody else will use the tensor that was made last, so that its user may write over it."""
        return self.shared.value is None and not torch.is_grad_enabled()

    def __call__(self) -> Tensor:
        """Return the tensor, and forget it with its last user; what a second derivative needs is made for it alone."""
        if torch.is_grad_enabled():
            return self.make()
        value = self.make() if self.shared.value is None else self.shared.value
        self.shared.users -= 1
        self.shared.value = value if self.shared.users > 0 else None
        return value


def remake(x: Tensor) -> Remake | None:
    """Return what makes `x` again in the backward pass of what it goes into, or None where `x` has to be kept.

    Autograd releases what a node has kept after the node's own backward, which comes later than that of its consumers.
    """
    node: Any = x.grad_fn
    make = _maker(node)
    if make is None or _checkpointed():
        return None
    # The node must not hold what makes x, which holds the node: no collector would find the two.
    shared = node.metadata.setdefault(_KEY, Shared())
    shared.users += 1
    return Remake(make, shared)


_KEY = "deltatune.remake"


def _checkpointed() -> bool:
    # Checkpointing gives out each kept tensor once, and drops x with the rest of its block anyway.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # type: ignore[attr-defined]
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


class Remade(Function):
    """A function whose output can be made again in the backward pass, from what it keeps anyway."""

    @staticmethod
    def again(ctx: Any) -> Tensor:
        """Return the output."""
        raise NotImplementedError

    @classmethod
    def maker(cls, ctx: Any) -> Make | None:
        """Return what makes the output again, or None where an input that it needs cannot be."""
        return lambda: cls.again(ctx)


def maker_of(ctx: Any, number: int = 0) -> Make | None:
    """Return what makes an input of a function again, or None where nothing does."""
    return _maker(ctx.next_functions[number][0])


def _maker(node: Any) -> Make | None:
    if isinstance(node, BackwardCFunction):
        made: Any = node._forward_cls  # type: ignore[attr-defined]
        return made.maker(node) if issubclass(made, Remade) else None
    known = None if node is None else _MAKERS.get(node.name())
    return None if known is None else known(node)


def _product(node: Any) -> Make | None:
    """A product keeps each factor for the gradient of the other one."""
    (left, _), (right, _) = node.next_functions
    if left is not None and right is not None:
        return lambda: node._saved_self * node._saved_other
    inner = _maker(left or right)
    if inner is None:
        return None
    return (lambda: inner() * node._saved_other) if right is None else (lambda: node._saved_self * inner())


def _cast(node: Any) -> Make | None:
    inner, dtype = _maker(node.next_functions[0][0]), node._input_metadata[0].dtype
    return None if inner is None else lambda: inner().to(dtype)


def _layer_norm(node: Any) -> Make:
    def make() -> Tensor:
        x, weight, bias = node._saved_input, node._saved_weight, node._saved_bias
        mean, rstd = node._saved_result1, node._saved_result2
        if torch.is_grad_enabled():  # what is kept of the statistics is cut off from x
            over = tuple(range(-len(node._saved_normalized_shape), 0))
            variance = x.var(over, correction=0, keepdim=True)
            mean, rstd = x.mean(over, keepdim=True), (variance + (rstd**-2 - variance).detach()).rsqrt()
        normed = (x - mean) * rstd
        normed = normed if weight is None else normed * weight
        return (normed if bias is None else normed + bias).to(x.dtype)

    return make


_MAKERS: dict[str, Callable[[Any], Make | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _cast,
    "NativeLayerNormBackward0": _layer_norm,
    "SiluBackward0": lambda node: lambda: F.silu(node._saved_self),
    "GeluBackward0": lambda node: lambda: F.gelu(node._saved_self, approximate=node._saved_approximate),
}
