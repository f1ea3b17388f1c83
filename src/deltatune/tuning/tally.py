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
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

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
class Work:
    """What one operation does: floating-point operations, and bytes that it reads and writes."""

    flops: int
    bytes: int


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
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in [*read, *made]}.values())
    count = flop_registry.get(func._overloadpacket)
    if "scaled_dot_product" in str(func) and count is None:
        return Work(_attention_flops(func, args), moved)
    if count is None:
        return Work(0, moved)
    return Work(count(*args, **kwargs, out_val=out), moved)  # type: ignore[arg-type]


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
        with FakeTensorMode(allow_non_fake_inputs=True), _copied_as_clones(), counted:
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


def fakes(model: nn.Module, device: torch.device) -> Any:
    """Return a copy of a model, on the meta device or not, whose tensors are fakes on `device`; use it inside `tally`."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)
