"""What is predicted: pure functions from windows of tokens and a random generator to a batch for the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from deltatune.backbones.pretrain.settings import Settings

Batch = dict[str, torch.Tensor]


class Objective(Protocol):
    """Windows of `window` tokens, int64 [rows, window], become the model's keyword arguments."""

    @property
    def window(self) -> int:
        """Tokens of text in one row."""
        ...

    def batch(self, windows: np.ndarray, rng: np.random.Generator) -> Batch:
        """The model's inputs and labels for these windows."""
        ...


@dataclass(frozen=True)
class NextToken:
    """Next-token prediction: loss = -mean_t log p(x_t | <bos>, x_<t); every token of the window is a target."""

    context: int
    bos: int

    @property
    def window(self) -> int:
        """One position of the context is the begin token."""
        return self.context - 1

    def batch(self, windows: np.ndarray, rng: np.random.Generator) -> Batch:
        """`input_ids` = `labels`, int64 [rows, context]; the model shifts the labels itself."""
        ids = torch.from_numpy(np.pad(windows, ((0, 0), (1, 0)), constant_values=self.bos))
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class SpanCorruption:
    """Span corruption (Raffel et al., 2020), a share of the batches being prefix language modelling instead.

    A share `noise` of each window is cut out in spans of mean length `span`; the input has one sentinel for each, the
    target each sentinel followed by what it stands for. All rows of a batch have equal lengths, so none is padded.
    A prefix batch gives the first `prefix` tokens and asks for the rest.
    """

    window: int
    noise: float
    span: float
    prefix_share: float
    prefix: int
    sentinels: tuple[int, ...]
    eos: int

    def batch(self, windows: np.ndarray, rng: np.random.Generator) -> Batch:
        """`input_ids` int64 [rows, input length] and `labels` int64 [rows, target length]."""
        if rng.random() < self.prefix_share:
            pairs = [(row[: self.prefix], row[self.prefix :]) for row in windows]
        else:
            pairs = [self.corrupt(row, rng) for row in windows]
        ends = [(np.append(source, self.eos), np.append(target, self.eos)) for source, target in pairs]
        sources, targets = zip(*ends, strict=True)
        return {"input_ids": torch.from_numpy(np.stack(sources)), "labels": torch.from_numpy(np.stack(targets))}

    def corrupt(self, row: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One window as (input, target), each without its end token."""
        noisy = min(max(1, round(len(row) * self.noise)), len(row) - 1)
        spans = min(max(1, round(noisy / self.span)), len(self.sentinels), noisy, len(row) - noisy)
        kept, cut = _partition(len(row) - noisy, spans, rng), _partition(noisy, spans, rng)
        source: list[np.ndarray] = []
        target: list[np.ndarray] = []
        position = 0
        for sentinel, keep, drop in zip(self.sentinels, kept, cut, strict=False):
            middle, end = position + keep, position + keep + drop
            source += [row[position:middle], np.array([sentinel])]
            target += [np.array([sentinel]), row[middle:end]]
            position = end
        return np.concatenate(source), np.concatenate(target)


def objective(settings: Settings, ids: dict[str, int]) -> Objective:
    """The objective that the settings name; `ids` maps the special tokens to their ids."""
    chosen = settings.objective
    if settings.causal:
        return NextToken(settings.model.context, ids["<bos>"])
    sentinels = tuple(ids[f"<extra_id_{index}>"] for index in range(chosen.sentinels))
    return SpanCorruption(
        settings.model.context, chosen.noise, chosen.span, chosen.prefix_share, chosen.prefix, sentinels, ids["<eos>"]
    )


def _partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` positive integers that sum to `total`, uniform over all such sequences."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))
