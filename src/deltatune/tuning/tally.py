"""Counting without computing: every tensor that a computation makes and frees, and what it calculates, in the order of execution.

Under `tally` tensors are fakes: they have shapes, types and devices and no memory, and each operation is chosen as it would be
on that device. What runs there is the real model, loop and optimizer, so nothing about a family or a method is known here.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, UnsupportedFakeTensorException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from deltatune.core.products import asked
from deltatune.core.stored import ORDINARY
from deltatune.errors import DeltaTuneError

FREE = {torch.ops.prim.device.default, torch.ops.aten.detach.default}  # they touch no number
SCALAR = torch.ops.aten._local_scalar_dense.default
INDEX = torch.ops.aten.index.Tensor


@dataclass(eq=False)
class Block:
    """One tensor's memory: bytes, the phase it was born in, what it is for, and the events at which it came and went."""

    bytes: int
    phase: str
    kind: str
    born: int
    died: int | None = None


@dataclass(frozen=True)
class Like:
    """The looks of a tensor that an operation is given."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def numbers(self) -> int:
        """How many numbers of memory it spans."""
        steps = ((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return 0 if 0 in self.shape else 1 + sum(steps)

    @property
    def bytes(self) -> int:
        """The bytes of these."""
        return self.numbers * self.dtype.itemsize


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
SMALL = 2 * 16**3  # flops of a product up to which torch multiplies by itself


@dataclass(frozen=True)
class Work:
    """What one operation does: floating-point operations, bytes that it reads and writes, and the call itself.

    `given` are its arguments as leaves of the tree `form`; `asked` is which library multiplies in float32.
    """

    flops: int
    bytes: int
    call: Any
    given: tuple[Any, ...]
    form: Any
    asked: bool

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of its tensors."""
        return tuple(leaf.shape for leaf in self.given if isinstance(leaf, Like))

    @property
    def compiled(self) -> bool:
        """Whether it is a product that oneDNN compiles: a larger one on a CPU, in bfloat16, or in float32 where it is asked for."""
        factors = [leaf for leaf in self.given if isinstance(leaf, Like)]
        kinds = {torch.bfloat16, torch.float32} if self.asked else {torch.bfloat16}
        multiplies = self.call.overloadpacket in PRODUCTS and self.flops > SMALL
        return multiplies and all(one.device.type == "cpu" and one.dtype in kinds for one in factors)


class Tally(TorchDispatchMode):
    """The blocks and the work of all that runs inside; `phase` and the vocabulary's size say what new blocks are for."""

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.work: list[Work] = []
        self.phase, self.time, self.vocabulary = "setup", 0, vocabulary
        self._live: dict[int, tuple[weakref.ref[Any], Block]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is SCALAR:  # fakes have no values; a loop that waits for a condition goes on to its longest
            return False if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is INDEX and _by_mask(args):  # as many as there are: a mask may choose all
            out = args[0].new_empty((args[1][0].numel(), *args[0].shape[args[1][0].dim() :]))
        else:
            out = func(*args, **(kwargs or {}))
        if func not in FREE:
            made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            if sum([self._keep(t) for t in made]) or (made and func._schema.is_mutable):
                self.work.append(_work(func, args, kwargs or {}, out, made))
        return out

    def block(self, tensor: Tensor) -> Block:
        """Return the block that a tensor lies in."""
        self._keep(tensor)
        return self._live[id(tensor.untyped_storage())][1]

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what the blocks of tensors are for."""
        for tensor in tensors:
            self.block(tensor).kind = kind

    def alive(self, phase: str) -> list[Block]:
        """Return the blocks born in a phase that are still there."""
        return [block for block in self.blocks if block.phase == phase and block.died is None]

    def peak(self, *phases: str) -> Counter[str]:
        """Return the bytes by kind at the moment of some phases at which the most are there."""
        inside = [b for b in self.blocks if b.phase in phases]
        moments = sorted({block.born for block in inside})
        changes = sorted([(b.born, b.bytes) for b in self.blocks] + [(b.died, -b.bytes) for b in self.blocks if b.died])
        total, best, at, index = 0, -1, 0, 0
        for moment in moments:
            while index < len(changes) and changes[index][0] <= moment:
                total += changes[index][1]
                index += 1
            if total > best:
                best, at = total, moment
        found: Counter[str] = Counter()
        for block in self.blocks:
            if block.born <= at and (block.died is None or block.died > at):
                found[block.kind] += block.bytes
        return found

    def _keep(self, tensor: Tensor) -> bool:
        """Take note of a tensor's memory; return whether it is new."""
        storage: Any = tensor.untyped_storage()
        known = self._live.get(id(storage))
        if known is not None and known[0]() is storage:
            return False
        wide = self.vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        self.time += 1
        block = Block(storage.nbytes(), self.phase, "logits" if wide else self.phase, self.time)
        self.blocks.append(block)
        self._live[id(storage)] = weakref.ref(storage), block
        weakref.finalize(storage, self._free, block)
        return True

    def _free(self, block: Block) -> None:
        self.time += 1
        block.died = self.time


def _by_mask(args: tuple[Any, ...]) -> bool:
    return len(args[1]) == 1 and args[1][0].dtype is torch.bool


def _work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, made: list[Tensor]) -> Work:
    leaves, form = tree_flatten((args, kwargs))
    read = [t for t in leaves if isinstance(t, Tensor)]
    moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in [*read, *made]}.values())
    given = tuple(_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return Work(_flops(func, args, kwargs, out), moved, func, given, form, asked())


def _like(t: Tensor) -> Like:
    return Like(tuple(t.shape), tuple(t.stride()), t.dtype, t.device)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    count = flop_registry.get(func._overloadpacket)
    if "scaled_dot_product" in str(func) and count is None:
        return _attention_flops(func, args)
    return 0 if count is None else count(*args, **kwargs, out_val=out)  # type: ignore[arg-type]


def _attention_flops(func: Any, args: tuple[Any, ...]) -> int:
    """Count fused attention; backward, whose first argument is a gradient, forms five products instead of two."""
    backward = "backward" in str(func)
    q, k, v = args[1:4] if backward else args[:3]
    once = sdpa_flop_count(q.shape, k.shape, v.shape)
    return once * 5 // 2 if backward else once


@contextmanager
def tally(vocabulary: int = 0) -> Iterator[Tally]:
    """The scope in which tensors are fakes and counted; raises `DeltaTuneError` for a computation that looks at values."""
    counted = Tally(vocabulary)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _copied_as_clones(), _taken_for_ordinary(), counted:
            yield counted
    except (RuntimeError, NotImplementedError, UnsupportedFakeTensorException) as error:
        raise DeltaTuneError(f"this cannot be planned without running it: {str(error).splitlines()[0]}.") from error


@contextmanager
def _copied_as_clones() -> Iterator[None]:
    """The scope in which a deep copy of a fake is a clone: torch would copy the memory behind it, and there is none."""
    kind: Any = FakeTensor
    kind.__deepcopy__ = lambda fake, memo: memo.setdefault(id(fake), fake.detach().clone())
    try:
        yield
    finally:
        del kind.__deepcopy__


@contextmanager
def _taken_for_ordinary() -> Iterator[None]:
    """The scope in which a fake is as ordinary a tensor as the one it stands for."""
    ORDINARY.add(FakeTensor)
    try:
        yield
    finally:
        ORDINARY.discard(FakeTensor)


def fakes(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of a model, on the meta device or not, whose tensors are fakes on `device`; use it inside `tally`.

    Numbers are of `dtype` where it is given; a fake cannot be cast in its place.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=kind, device=device)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)
