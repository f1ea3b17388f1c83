"""Examples as token ids, and rows of token ids as padded batches, for the three kinds of backbone.

A row is an input and its labels. The loss of a row is the negative log-likelihood of its labels, and the score of a
candidate answer is minus that loss: training and scoring read the same rows.

| kind    | input                                   | labels                                            |
|---------|-----------------------------------------|---------------------------------------------------|
| causal  | front, prompt, target, eos              | as long as the input; IGNORED before the target   |
| seq2seq | front, prompt, back                     | target, eos                                       |
| masked  | front, before, mask x k, after, back    | as long as the input; IGNORED outside the k masks |

`front` and `back` are the special tokens that the tokenizer puts around every text. A prompt that is too long loses
its beginning: its end holds the cue that the answer continues, and no answer is ever cut to make room for a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from deltatune.errors import DeltaTuneError
from deltatune.tuning.widths import EXACT, Widths, wide

if TYPE_CHECKING:
    from deltatune.backbones import Backbone
    from deltatune.tasks import Prompt

IGNORED = -100
WINDOW = 16  # the most batches that are sorted by length together: wider windows save hardly any padding
PADDED = 1.25  # batches may read so many times the tokens of their rows: sorting costs loss, and stops where this holds

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One input and its labels, as token ids."""

    input: Ids
    labels: Ids

    @property
    def tokens(self) -> int:
        """How many tokens the backbone reads; labels that do not lie along the input are read by a decoder."""
        return len(self.input) + (0 if self.labels[0] == IGNORED else len(self.labels))


def sizes_of(rows: Sequence[Row]) -> list[int]:
    """Return the lengths that rows are sorted by: without the answers where these recur, as labels do.

    Where inputs are cut to one length, whole lengths would put one label into each batch.
    """
    answers = [tuple(label for label in row.labels if label != IGNORED) for row in rows]
    recur = 2 * len(set(answers)) <= len(rows)
    return [row.tokens - recur * len(answer) for row, answer in zip(rows, answers, strict=True)]


class Codec:
    """The tokenizer of one backbone with the length limits of one recipe."""

    def __init__(self, backbone: Backbone, max_input: int, max_target: int) -> None:
        self.tokenizer: Any = backbone.tokenizer
        self.kind: Literal["causal", "seq2seq", "masked"] = backbone.kind
        self.max_target = max_target
        self.max_input = min(max_input, _positions(backbone) - (max_target if self.kind == "causal" else 0))
        self.front, self.back = _frame(self.tokenizer)
        self.eos: Ids = () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)
        self._targets: dict[str, Ids] = {}
        if self.max_input < 8:
            raise DeltaTuneError(
                f"max_target {max_target} leaves {self.max_input} of the backbone's {_positions(backbone)} positions for "
                "the prompt; write a smaller max_target."
            )
        if self.kind == "masked" and self.tokenizer.mask_token_id is None:
            raise DeltaTuneError("a masked backbone needs a tokenizer with a mask token; this one has none.")

    @property
    def pad(self) -> int:
        """The id that fills batches; attention never reads it, so any id serves where the tokenizer has none."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (self.eos or (0,))[0]

    def row(self, prompt: Prompt, answer: str) -> Row:
        """Return the row in which the backbone reads `prompt` and answers `answer`."""
        target = self.target(answer)
        if self.kind == "seq2seq":
            return Row(self.question(prompt), target)
        if self.kind == "causal":
            question = self.question(prompt)
            return Row(question + target, (IGNORED,) * len(question) + target)
        before, after = self._around(prompt, len(target))
        masks = (self.tokenizer.mask_token_id,) * len(target)
        labels = (IGNORED,) * len(before) + target + (IGNORED,) * len(after)
        return Row(before + masks + after, labels)

    def question(self, prompt: Prompt) -> Ids:
        """Return the input up to where the answer begins: what a causal or encoder-decoder backbone generates from."""
        back = self.back if self.kind == "seq2seq" else ()
        room = self.max_input - len(self.front) - len(back)
        return self.front + self._plain(prompt.text)[-room:] + back

    def target(self, answer: str) -> Ids:
        """Return the label ids of an answer, closed by the end-of-sequence token where a decoder produces it."""
        if answer not in self._targets:
            end = () if self.kind == "masked" else self.eos
            whole = self.kind == "seq2seq"
            ids = tuple(self.tokenizer(text_target=answer).input_ids) if whole else self._continuation(answer)
            if not ids:
                raise DeltaTuneError(f"the backbone's tokenizer has no tokens for the answer {answer!r}.")
            if ids[-1:] != end:
                ids = ids + end
            if len(ids) > self.max_target:
                ids = ids[: self.max_target - len(end)] + end
            self._targets[answer] = ids
        return self._targets[answer]

    def _plain(self, text: str) -> Ids:
        # Texts longer than the backbone's positions are cut afterwards, so the tokenizer's warning would be wrong.
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def _continuation(self, answer: str) -> Ids:
        # The ids of " answer" after some text. Tokenizers treat the start of a text in their own ways, so an anchor
        # stands before it; where the anchor's ids are not a prefix, the tokens cross the space and the start must do.
        anchor = self._plain(":")
        joint = self._plain(": " + answer)
        return joint[len(anchor) :] if joint[: len(anchor)] == anchor else self._plain(" " + answer)

    def _around(self, prompt: Prompt, masks: int) -> tuple[Ids, Ids]:
        slot = len(prompt.text) if prompt.slot is None else prompt.slot
        before = self._plain(prompt.text[:slot].rstrip())
        after = self._plain(prompt.text[slot:].removeprefix("{mask}"))
        room = max(self.max_input - masks - len(self.front) - len(self.back), 2)
        after = after[: max(room - len(before), room // 2)]
        before = before[len(before) - min(len(before), room - len(after)) :]
        return self.front + before, after + self.back


def collate(
    rows: Sequence[Row], pad: int, device: torch.device | str = "cpu", widths: Widths = EXACT
) -> dict[str, Tensor]:
    """Return `input_ids`, `attention_mask` [B, L] and `labels` [B, T], filled up on the right to one of the widths."""
    batch = pad_inputs([row.input for row in rows], pad, widths=widths.inputs)
    batch["labels"] = rectangle([row.labels for row in rows], IGNORED, widths=widths.labels)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def pad_inputs(inputs: Sequence[Ids], pad: int, left: bool = False, widths: Sequence[int] = ()) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` [B, L]; generation continues at the right end, so it pads on the left."""
    return {
        "input_ids": rectangle(inputs, pad, left, widths),
        "attention_mask": rectangle([(1,) * len(ids) for ids in inputs], 0, left, widths),
    }


def batches(sizes: Sequence[int], batch: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Yield the indices of one batch after another, epoch after epoch, from step `start` on.

    The order is a function of (seed, epoch) alone, so the step is the whole position in the data.
    """
    per_epoch = -(-len(sizes) // batch)
    epoch, skip = divmod(start, per_epoch)
    while True:
        yield from epoch_order(sizes, batch, seed, epoch)[skip:]
        epoch, skip = epoch + 1, 0


def epoch_order(sizes: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Return one epoch's batches of indices; every index occurs once and only one batch may be smaller.

    The examples are shuffled, sorted by size inside windows of as few batches as keep the padding within `PADDED`, of
    `WINDOW` if none do, cut into batches, and these shuffled.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(sizes)).tolist()
    window, groups = 1, _sorted_in_windows(order, sizes, batch, 1)
    while window < WINDOW and tokens_read(groups, sizes) > PADDED * sum(sizes):
        window *= 2
        groups = _sorted_in_windows(order, sizes, batch, window)
    return [groups[index] for index in random.permutation(len(groups)).tolist()]


def tokens_read(groups: Sequence[Sequence[int]], sizes: Sequence[int]) -> int:
    """Return how many tokens batches read, each as wide as its longest row."""
    return sum(len(group) * max(sizes[index] for index in group) for group in groups)


def _sorted_in_windows(order: Sequence[int], sizes: Sequence[int], batch: int, window: int) -> list[list[int]]:
    """Return an order cut into batches after each `window` batches of it have been sorted by size."""
    groups: list[list[int]] = []
    for first in range(0, len(order), window * batch):
        part = sorted(order[first : first + window * batch], key=lambda index: sizes[index])
        groups += [part[cut : cut + batch] for cut in range(0, len(part), batch)]
    return groups


def rectangle(rows: Sequence[Ids], fill: int, left: bool = False, widths: Sequence[int] = ()) -> Tensor:
    """Return rows of unequal length as a tensor [B, width], filled up on the right or on the left.

    The width is that of the longest row, or the next of `widths` where they go so far.
    """
    width = wide(max(len(row) for row in rows), widths)
    if left:
        return torch.tensor([(fill,) * (width - len(row)) + row for row in rows])
    return torch.tensor([row + (fill,) * (width - len(row)) for row in rows])


def _frame(tokenizer: Any) -> tuple[Ids, Ids]:
    """Find the special tokens before and after a text by comparing it with and without them."""
    bare = tuple(tokenizer("a", add_special_tokens=False).input_ids)
    full = tuple(tokenizer("a").input_ids)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return (), ()


def _positions(backbone: Backbone) -> int:
    """How many positions the backbone knows; a backbone with relative positions only has no limit."""
    limit = getattr(backbone.model.config, "max_position_embeddings", None)
    # The tokenizer knows the positions that a family keeps for itself, such as the two of RoBERTa.
    return min(limit, backbone.tokenizer.model_max_length) if isinstance(limit, int) else 1 << 30
