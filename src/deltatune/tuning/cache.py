"""What the frozen blocks make of each example, kept from one epoch to the next, so that later epochs skip these blocks.

A row's hidden states are those of its batch in the first epoch, whatever step the run is at, without the padding, which
every batch gives them anew as zeros. So a run that was killed has the numbers of one that was not. The first epoch has
those of a run without a cache bit for bit, unless the last block is skipped too, whose feed-forward layer ran on all
tokens then (see `loss`); later epochs have them to rounding, as sums over a row may run in another order beside other
rows. Rows beyond the bound are computed again in every batch that they are in.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deltatune.core.frozen import FrozenBlock, FrozenBlocks, frozen_blocks
from deltatune.errors import DeltaTuneError
from deltatune.tuning.encode import Row
from deltatune.tuning.recipe import Recipe


@dataclass(frozen=True)
class Bound:
    """How many bytes a cache may hold, 0 for none, and whether on disk: in a file without a name, which ends with the run."""

    bytes: int = 10**9
    on_disk: bool = False


@dataclass(frozen=True)
class Data:
    """The rows of a run, its batches in the first epoch, and what makes a padded batch of rows."""

    rows: Sequence[Row]
    groups: Sequence[Sequence[int]]
    collate: Callable[[Sequence[Row]], dict[str, Tensor]]

    @property
    def probe(self) -> list[int]:
        """Two rows to try things on, of different lengths where there are such."""
        order = sorted(range(len(self.rows)), key=lambda index: len(self.rows[index].input))
        return [order[0], order[len(order) // 2]]

    def length(self, stack: str, index: int) -> int:
        """Return how many tokens of a row a stack sees."""
        row = self.rows[index]
        return len({"input_ids": row.input, "labels": row.labels}[_read(stack)])

    def ends(self, stack: str, indices: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Return where each row begins and ends when the tokens of some rows lie behind one another."""
        found, end = {}, 0
        for index in indices:
            found[index] = end, end + self.length(stack, index)
            end = found[index][1]
        return found

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return some rows as a padded batch."""
        return self.collate([self.rows[index] for index in indices])


def _read(stack: str) -> str:
    """Return what of a batch a stack reads: the stack that writes reads the labels, each behind the one before."""
    return "labels" if stack == "decoder" else "input_ids"


class NoCache:
    """Nothing is kept, for a reason."""

    def __init__(self, why: str) -> None:
        self.report: dict[str, Any] = {"off": why}

    def given(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """The scope of a forward pass over these rows."""
        return nullcontext()


class Shelf:
    """The hidden states of one block without padding, behind one another: [tokens of all rows that are kept, width]."""

    def __init__(self, block: FrozenBlock, ends: Mapping[int, tuple[int, int]], folder: Path | None) -> None:
        self.ends, tokens = ends, max(end for _, end in ends.values())
        self.held = _numbers(tokens * block.width, block.dtype, folder).view(tokens, block.width)

    def row(self, index: int) -> Tensor:
        """Return what is kept of one row [tokens, width], to be read or written to."""
        return self.held[slice(*self.ends[index])]

    @property
    def bytes(self) -> int:
        """The size of what can be kept."""
        return self.held.numel() * self.held.element_size()


def _numbers(count: int, dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Return room for `count` numbers: in memory, which is taken when it is written to, or in a file of the folder."""
    if folder is None:
        return torch.empty(count, dtype=dtype)
    size = count * dtype.itemsize
    try:
        # The file has no name, so it goes when the process does, however that ends.
        with tempfile.TemporaryFile(dir=folder) as file:
            if sys.platform == "linux":  # so that a full disk is an error here, and not a signal at some later write
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype)
    except OSError as error:
        raise DeltaTuneError(
            f"there is no room for a cache of {size:,} bytes in {folder}: {error.strerror}; write a smaller one, or 0."
        ) from error


class Cache:
    """The hidden states of frozen blocks for each row: of the rows `kept` from epoch to epoch, of others for their batch."""

    def __init__(self, frozen: FrozenBlocks, data: Data, kept: Sequence[int], folder: Path | None) -> None:
        self.frozen, self.data = frozen, data
        self.index = {id(row): index for index, row in enumerate(data.rows)}
        self.group = {index: number for number, group in enumerate(data.groups) for index in group}
        self.kept, self.missing = frozenset(kept), set(kept)
        ends = {stack: data.ends(stack, kept) for stack in frozen.by_stack}
        self.shelves = [Shelf(block, ends[block.place.stack], folder) for block in frozen.read]

    @property
    def report(self) -> dict[str, Any]:
        """What is skipped and kept, for the result of a run."""
        return {
            "skipped": [block.place.path for block in self.frozen.blocks],
            "kept": [block.place.path for block in self.frozen.read],
            "examples": len(self.kept),
            "bytes": sum(shelf.bytes for shelf in self.shelves),
        }

    def given(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """The scope of a forward pass over these rows, in which the frozen blocks are skipped."""
        return self.frozen.given(self.outputs([self.index[id(row)] for row in rows]))

    def outputs(self, indices: Sequence[int]) -> list[Tensor]:
        """Return what each block that is read puts out for a batch of rows, [rows, tokens, width], padded with zeros."""
        for number in dict.fromkeys(self.group[index] for index in indices if index in self.missing):
            self._keep(self.data.groups[number])
        beyond = [index for index in indices if index not in self.kept]
        computed = self._compute(beyond) if beyond else [{} for _ in self.shelves]
        batch = []
        for shelf, new in zip(self.shelves, computed, strict=True):
            rows = [shelf.row(index) if index in self.kept else new[index] for index in indices]
            batch.append(pad_sequence(rows, batch_first=True))
        return batch

    def _keep(self, group: Sequence[int]) -> None:
        for shelf, states in zip(self.shelves, self._compute(group), strict=True):
            for index in self.missing.intersection(group):
                shelf.row(index).copy_(states[index])
        self.missing.difference_update(group)

    def _compute(self, indices: Sequence[int]) -> list[dict[int, Tensor]]:
        """Run the frozen blocks on some rows, and return each row's states [tokens, width], for each block that is read."""
        outputs = self.frozen.outputs(lambda: self.frozen.model(**self.data.batch(indices)))
        return [
            {index: h[row, : self.data.length(block.place.stack, index)].cpu() for row, index in enumerate(indices)}
            for block, h in zip(self.frozen.read, outputs, strict=True)
        ]


def fitting(frozen: FrozenBlocks, data: Data, room: int) -> list[int]:
    """Return the rows whose states fit into `room` bytes: the first ones of the first epoch, in whole batches."""
    kept: list[int] = []
    numbers = {s: sum(b.width * b.dtype.itemsize for b in blocks if b.read) for s, blocks in frozen.by_stack.items()}
    for group in data.groups:
        room -= sum(size * data.length(stack, index) for stack, size in numbers.items() for index in group)
        if room < 0:
            break
        kept += group
    return kept


def frozen_cache(model: Any, data: Data, recipe: Recipe, bound: Bound, folder: Path) -> Cache | NoCache:
    """Return a cache for a run, or say why there is none: it is used only where it changes nothing and spares something."""
    if not bound.bytes:
        return NoCache("no room is given to it")
    if recipe.compiler != "none":
        return NoCache("what is compiled is computed as a whole")
    if recipe.dropout:
        return NoCache("dropout is on, so that no block puts out the same twice")
    if recipe.steps <= len(data.groups):
        return NoCache("no example is seen twice")
    batch = data.batch(data.probe)
    frozen = frozen_blocks(model, lambda: model(**batch))
    if not frozen.blocks:
        return NoCache("no block lies below the delta")
    lengths = {stack: batch[_read(stack)].shape[1] for stack in frozen.by_stack}
    if any(block.length != lengths[block.place.stack] for block in frozen.blocks):
        return NoCache("the blocks see tokens that are not of the examples")
    kept = fitting(frozen, data, bound.bytes)
    if not kept:
        return NoCache(f"{bound.bytes:,} bytes do not hold one batch")
    with torch.no_grad():
        plain = model(**batch).loss
        with frozen.given(frozen.outputs(lambda: model(**batch))):
            same = torch.equal(model(**batch).loss, plain)
    if not same:
        return NoCache("this backbone reads the blocks' outputs in some other way too")
    return Cache(frozen, data, kept, folder if bound.on_disk else None)
