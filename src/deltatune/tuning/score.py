"""Answering by likelihood: the candidate whose tokens the backbone finds most probable, in batches.

    score(candidate) = sum_t log p(candidate_t | prompt, candidate_<t)      causal and encoder-decoder, eos included
    score(candidate) = sum_t log p(candidate_t | prompt with k masks)       masked, all k masks at once

A candidate's score is minus the summed loss of its row, so training and scoring agree on every token. A causal backbone
reads each prompt once and an encoder-decoder encodes it once; the candidates continue from the cached keys and values.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from deltatune.core.products import products
from deltatune.tuning.encode import IGNORED, Ids, Row, pad_inputs, rectangle

if TYPE_CHECKING:
    from deltatune.backbones import Backbone

Item = TypeVar("Item")
Questions = Sequence[Sequence[Row]]

LOGITS = 1 << 24  # numbers in the logits of one forward pass: 64 MiB in float32
SPREAD = 4  # candidates that are read together, for each question of a batch


@dataclass(frozen=True)
class Begun:
    """What a backbone makes of the prompts: log p of the next token [B, V], its cache, and how to go on from there.

    `extend(owner, ids, cache)` returns the logits [N, T, V] of tokens [N, T] that continue the prompts `owner` [N].
    """

    first: Tensor
    cache: Any
    extend: Callable[[Tensor, Tensor, Any], Tensor]


def score_candidates(backbone: Backbone, questions: Questions, batch: int, pad: int) -> list[list[float]]:
    """Return log p of every candidate row of every question, in nats; `batch` questions are read together."""
    order = sorted(range(len(questions)), key=lambda index: max(len(row.input) for row in questions[index]))
    scores: list[list[float]] = [[] for _ in questions]
    device = next(backbone.model.parameters()).device
    with torch.no_grad(), products(device):
        for first in range(0, len(order), batch):
            group = order[first : first + batch]
            flat = SCORERS[backbone.kind](backbone.model, [questions[index] for index in group], pad)
            for index in group:
                scores[index] = [next(flat) for _ in questions[index]]
    return scores


def choose(scores: Sequence[Sequence[float]]) -> list[int]:
    """Return the index of the best candidate of each question; of equal ones the first."""
    return [max(range(len(row)), key=row.__getitem__) for row in scores]


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return sum_t log p(labels_t) [B], in nats, of logits [B, T, V] and labels [B, T]; IGNORED labels count nothing."""
    losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return -losses.sum(-1)


def _causal(model: Any, questions: Questions, pad: int) -> Iterator[float]:
    lengths = [rows[0].labels.count(IGNORED) for rows in questions]
    prompts = [rows[0].input[:length] for rows, length in zip(questions, lengths, strict=True)]
    targets = [[row.labels[length:] for row in rows] for rows, length in zip(questions, lengths, strict=True)]
    data = _on(model, pad_inputs(prompts, pad, left=True))
    mask = data["attention_mask"]
    # Padded on the left, every prompt ends in the last column; positions count from its first token, as in generation.
    begin = _accepted(model, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), logits_to_keep=1)
    out = model(**data, **begin, use_cache=True)

    def extend(owner: Tensor, ids: Tensor, cache: Any) -> Tensor:
        steps = torch.arange(ids.shape[1], device=ids.device)
        longer = torch.cat([mask[owner], torch.ones_like(ids)], 1)
        positions = _accepted(model, position_ids=mask[owner].sum(-1, keepdim=True) + steps)
        return model(input_ids=ids, attention_mask=longer, past_key_values=cache, use_cache=True, **positions).logits

    return _continue(Begun(out.logits[:, -1].float().log_softmax(-1), out.past_key_values, extend), targets, pad)


def _seq2seq(model: Any, questions: Questions, pad: int) -> Iterator[float]:
    from transformers.modeling_outputs import BaseModelOutput

    data = _on(model, pad_inputs([rows[0].input for rows in questions], pad))
    mask, hidden = data["attention_mask"], model.get_encoder()(**data).last_hidden_state

    def decode(states: Tensor, seen: Tensor, ids: Tensor, cache: Any) -> Any:
        return model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=seen,
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=True,
        )

    def extend(owner: Tensor, ids: Tensor, cache: Any) -> Tensor:
        return decode(hidden[owner], mask[owner], ids, cache).logits

    out = decode(hidden, mask, torch.full_like(mask[:, :1], model.config.decoder_start_token_id), None)
    targets = [[row.labels for row in rows] for rows in questions]
    return _continue(Begun(out.logits[:, -1].float().log_softmax(-1), out.past_key_values, extend), targets, pad)


def _continue(begun: Begun, targets: Sequence[Sequence[Ids]], pad: int) -> Iterator[float]:
    """Yield log p of every target: its first token from what is begun, the others in a pass that continues the cache."""
    pairs = [(index, target) for index, group in enumerate(targets) for target in group]
    order = sorted(range(len(pairs)), key=lambda place: len(pairs[place][1]))
    scores = [0.0] * len(pairs)
    device, vocabulary = begun.first.device, begun.first.shape[-1]
    width = max(len(target) for _, target in pairs)
    for places in _chunks(order, min(LOGITS // (width * vocabulary), SPREAD * len(targets))):
        owner = torch.tensor([pairs[place][0] for place in places], device=device)
        labels = rectangle([pairs[place][1] for place in places], IGNORED).to(device)
        total = begun.first[owner].gather(-1, labels[:, :1])[:, 0]
        if labels.shape[1] > 1:
            cache = copy.deepcopy(begun.cache)
            cache.batch_select_indices(owner)
            ids = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad)
            total = total + log_likelihood(begun.extend(owner, ids, cache), labels[:, 1:])
        for place, value in zip(places, total.tolist(), strict=True):
            scores[place] = value
    return iter(scores)


def _masked(model: Any, questions: Questions, pad: int) -> Iterator[float]:
    rows = [row for group in questions for row in group]
    # Candidates of one length share their input, and one forward pass.
    inputs = {row.input: [label != IGNORED for label in row.labels] for row in rows}
    probabilities: dict[Ids, Tensor] = {}
    numbers = max(len(ids) for ids in inputs) * model.config.vocab_size
    for chunk in _chunks(list(inputs), LOGITS // numbers):
        logits = model(**_on(model, pad_inputs(chunk, pad))).logits
        for place, ids in enumerate(chunk):
            slots = torch.tensor(inputs[ids], device=logits.device)
            probabilities[ids] = logits[place, : len(ids)][slots].float().log_softmax(-1)
    for row in rows:
        target = torch.tensor(
            [label for label in row.labels if label != IGNORED], device=probabilities[row.input].device
        )
        yield float(probabilities[row.input].gather(-1, target[:, None]).sum())


SCORERS = {"causal": _causal, "seq2seq": _seq2seq, "masked": _masked}


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for first in range(0, len(items), max(1, size)):
        yield items[first : first + max(1, size)]


def _on(model: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in data.items()}


def _accepted(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Keep the arguments that this family's forward knows: some work positions out by themselves."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in options.items() if name in known}
