"""Frozen blocks: those that no trained tensor reaches, so that what they put out for a text never changes in training.

Which they are shows in one forward pass: the leading blocks of each stack whose outputs want no gradient. Where the
outputs that something reads are known, the blocks are skipped: the reader of the last one, and whatever acts behind a
block (the rungs of a ladder), is given them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.core.attach import edited
from deltatune.core.builders import first_argument
from deltatune.core.calls import Ports, run
from deltatune.core.ports import Edit
from deltatune.core.site import Place, anatomy

# What a block hands on besides the hidden state: nothing, an argument by its place or name, or what it makes for all rows alike.
Rest = tuple[Literal["nothing", "made"], None] | tuple[Literal["argument"], int | str]


@dataclass(frozen=True)
class FrozenBlock:
    """A frozen block: what its hidden state is called and how large it is, what else it hands on, and whether that state is read.

    `rest` is None where it hands on the hidden state alone, and not in a tuple.
    """

    place: Place
    module: nn.Module
    first: str
    length: int
    width: int
    dtype: torch.dtype
    rest: tuple[Rest, ...] | None
    read: bool = False


@dataclass(frozen=True)
class Seen:
    """One call of a block: what came in and out, and what is known of it; None where it is not frozen, or in an unknown form."""

    place: Place
    x: Any
    h: Any
    block: FrozenBlock | None


class _Enough(Exception):
    """Ends a forward pass whose wanted outputs are there."""


class Watch:
    """around: remembers what a call showed."""

    method = "watched"

    def __init__(self, place: Place, seen: list[Seen]) -> None:
        self.place, self.seen = place, seen

    def around(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = run(Ports(here.module), args, kwargs)
        first = first_argument(here.module)
        h, *others = y if isinstance(y, tuple) else (y,)
        rest = [_rest(item, args, kwargs) for item in others]
        known = tuple(item for item in rest if item is not None)
        block = None
        if isinstance(h, Tensor) and h.dim() == 3 and not h.requires_grad and len(known) == len(rest):
            length, width = h.shape[1:]
            handed = known if isinstance(y, tuple) else None
            block = FrozenBlock(self.place, here.module, first, length, width, h.dtype, handed, bool(here.post))
        self.seen.append(Seen(self.place, args[0] if args else kwargs[first], h, block))
        return y


def _rest(item: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rest | None:
    """Say how to come by what a block of two rows handed on; None where that is not known."""
    if item is None:
        return "nothing", None
    for name, value in (*enumerate(args), *kwargs.items()):
        if item is value:
            return "argument", name
    without_rows = isinstance(item, Tensor) and item.shape[:1] == (1,) and not item.requires_grad
    return ("made", None) if without_rows else None


class Keep:
    """around: keeps the hidden state that a block puts out, and ends the pass behind the last block."""

    method = "kept"

    def __init__(self, kept: list[Tensor], last: bool) -> None:
        self.kept, self.last = kept, last

    def around(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = run(Ports(here.module), args, kwargs)
        self.kept.append(y[0] if isinstance(y, tuple) else y)
        if self.last:
            raise _Enough
        return y


class Skip:
    """around: hands on a known hidden state instead of calling the block, or what came in where nothing reads its output.

    The state of a batch that is padded further than it is known becomes longer by zeros.
    """

    method = "skipped"

    def __init__(self, block: FrozenBlock, output: Tensor | None) -> None:
        self.block, self.output = block, output

    def around(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        h = args[0] if args else kwargs[self.block.first]
        if self.output is not None:
            h = F.pad(self.output.to(h.device), (0, 0, 0, h.shape[1] - self.output.shape[1]))
        rest = self.block.rest
        if rest is None:
            return h
        made: Any = [None] * (len(rest) + 1)
        if ("made", None) in rest:
            with torch.no_grad():
                made = run(Ports(here.module), _one_row(args), _one_row(kwargs))
        given = {**dict(enumerate(args)), **kwargs}
        return (h, *(given[name] if name is not None else own for (_, name), own in zip(rest, made[1:], strict=True)))


def _one_row(value: Any) -> Any:
    """Return the arguments of a call for its first row alone."""
    if isinstance(value, Tensor):
        return value[:1]
    if isinstance(value, dict):
        return {name: _one_row(item) for name, item in value.items()}
    return tuple(_one_row(item) for item in value) if isinstance(value, tuple) else value


class FrozenBlocks:
    """The frozen blocks of a model with its deltas, in the order of their calls; `read` are those whose outputs are needed."""

    def __init__(self, model: nn.Module, blocks: Sequence[FrozenBlock]) -> None:
        self.model, self.blocks = model, blocks
        self.read = [block for block in blocks if block.read]
        self.by_stack: dict[str, list[FrozenBlock]] = {}
        for block in blocks:
            self.by_stack.setdefault(block.place.stack, []).append(block)

    @torch.no_grad()
    def outputs(self, call: Callable[[], Any]) -> list[Tensor]:
        """Run `call`, a forward pass, up to the last frozen block, and return the hidden states that are read."""
        kept: list[Tensor] = []
        edits = [Edit(block.module, "around", Keep(kept, block is self.read[-1])) for block in self.read]
        with edited(self.model, edits), suppress(_Enough):
            call()
        return kept

    @contextmanager
    def given(self, outputs: Iterable[Tensor]) -> Iterator[None]:
        """The scope in which the frozen blocks are skipped, because these are the hidden states that are read."""
        known = iter(outputs)
        skips = [Skip(block, next(known) if block.read else None) for block in self.blocks]
        with edited(self.model, [Edit(skip.block.module, "around", skip) for skip in skips]):
            yield


def frozen_blocks(model: nn.Module, call: Callable[[], Any]) -> FrozenBlocks:
    """Find the frozen blocks by running `call`, a forward pass over two rows with gradients on.

    A block that is called twice, or whose output has a form that is not known, ends what is frozen of its stack.
    """
    places = anatomy(model).blocks
    seen: list[Seen] = []
    with torch.enable_grad(), edited(model, [_watched(model, place, seen) for place in places]):
        call()
    calls = Counter(one.place.path for one in seen)
    found: list[FrozenBlock] = []
    for stack in dict.fromkeys(one.place.stack for one in seen):
        own = [one for one in seen if one.place.stack == stack]
        found += _leading(own) if all(calls[one.place.path] == 1 for one in own) else []
    return FrozenBlocks(model, found)


def _watched(model: nn.Module, place: Place, seen: list[Seen]) -> Edit:
    return Edit(model.get_submodule(place.path), "around", Watch(place, seen))


def _leading(seen: list[Seen]) -> list[FrozenBlock]:
    """Return the frozen blocks that a stack begins with; read is one whose output is not simply what the next block takes."""
    found: list[FrozenBlock] = []
    for place, one in enumerate(seen):
        if one.block is None:
            break
        after = seen[place + 1] if place + 1 < len(seen) else None
        passed_on = after is not None and after.block is not None and after.x is one.h
        found.append(replace(one.block, read=one.block.read or not passed_on))
    return found
