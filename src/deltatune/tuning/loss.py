"""The training loss without what it does not ask for: the same number and gradients as the backbone's own, to rounding.

    loss = mean over the labels that count of -log softmax(h W^T + b)[label]

Behind the last attention every token is on its own, so the last feed-forward layer and the head see those tokens only
whose labels count; the others see no padding. Where the head is a frozen linear layer without a delta, and what it puts out
are the logits, product and loss are computed in chunks of tokens together with the gradient of h, so that all logits are
never there at once. What holds for a backbone shows on two rows; where nothing does, its own loss is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.core.attach import attachments, edited
from deltatune.core.calls import Ports, run
from deltatune.core.ports import PORTS, Edit
from deltatune.core.site import Anatomy, Place, Site, anatomy
from deltatune.core.stored import storage
from deltatune.tuning.encode import IGNORED
from deltatune.tuning.tokens import Tokens, present
from deltatune.tuning.widths import EXACT, Widths

CHUNK = 1 << 24  # logits that are there at once: 64 MiB in float32

Batch = dict[str, Tensor]
Asked = Callable[[Tensor], tuple[Tensor, Tensor]]
Loss = Callable[[Batch], Tensor]
Ends = tuple[nn.Module, nn.Module]  # the modules at which a feed-forward layer begins and ends


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over the labels that count, of logits [..., vocabulary], as transformers' models do."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


class ChunkedLoss(torch.autograd.Function):
    """cross_entropy(x W^T + b, labels) for x [tokens, d] and labels [tokens], with the gradient of x made on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, labels: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        W, b = W.to(dtype), None if b is None else b.to(dtype)
        losses, gradient, size = [], torch.empty_like(x), max(1, CHUNK // W.shape[0])
        for own, wanted, out in zip(x.split(size), labels.split(size), gradient.split(size), strict=True):
            logits, labelled = F.linear(own.to(dtype), W, b), wanted[:, None]
            p = logits.softmax(-1, torch.promote_types(dtype, torch.float32))
            highest = logits.amax(-1, keepdim=True).to(p.dtype)  # p is not 0 there, as it may be at the label
            losses.append((highest - p.amax(-1, keepdim=True).log() - logits.gather(1, labelled)).sum())
            slope = p.scatter_add_(1, labelled, p.new_full((len(wanted), 1), -1.0))
            out.copy_(slope.to(dtype) @ W)
        ctx.save_for_backward(gradient)
        ctx.tokens = len(labels)
        return torch.stack(losses).sum() / len(labels)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * (slope / ctx.tokens).to(gradient.dtype), None, None, None


class Chunks:
    """around the head: compute the loss in chunks, and hand on no logits."""

    method = "chunked loss"

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.loss: Tensor | None = None

    def around(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        head: Any = here.module
        self.loss = ChunkedLoss.apply(args[0][0], head.weight, head.bias, self.labels)
        return args[0].new_empty(1, 0, head.out_features)


class Look:
    """around a module: remembers what came in and what came out."""

    method = "seen"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any]] = []

    def around(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = run(Ports(here.module), args, kwargs)
        self.calls.append((args[0] if args else None, y))
        return y

    def by_token(self, tokens: int) -> bool:
        """Whether it was called once, from one hidden state to another for each token."""
        (x, y), *more = self.calls or [(None, None)]
        both = isinstance(x, Tensor) and isinstance(y, Tensor)
        return both and not more and x.shape[:-1] == y.shape[:-1] and x.shape[:-1].numel() == tokens


@dataclass(frozen=True)
class Reading:
    """Where the loss is read: the head, the last feed-forward layer, if it is known, and the others that see the input.

    `shifted` where a token's label is the next one's, `decodes` where another stack reads the input.
    """

    head: nn.Module
    ffn: Ends | None
    shifted: bool
    decodes: bool
    others: tuple[Ends, ...] = ()
    chunked: bool = False

    @property
    def known(self) -> list[tuple[nn.Module, ...]]:
        """The modules at which something begins or ends."""
        return [(self.head,), *([self.ffn] if self.ffn else []), *self.others]

    def edits(self, index: Tensor, chunks: Chunks, there: Tensor | None) -> list[Edit]:
        """Return the ports of one forward pass that answers for the tokens at `index` of an input whose tokens are `there`."""
        edits = [Edit(self.head, "pre", Tokens(index))]
        if self.chunked:
            edits.append(Edit(self.head, "around", chunks))
        if self.ffn is not None:
            edits += _seeing(self.ffn, index)
        return edits if there is None else edits + [edit for ends in self.others for edit in _seeing(ends, there)]

    def asked(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places of the tokens, counted through the batch, whose labels count, and these labels."""
        wanted = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.shifted else labels
        index = (wanted.flatten() != IGNORED).nonzero()[:, 0]
        return index, wanted.flatten()[index]


def _seeing(ends: Ends, index: Tensor) -> list[Edit]:
    """Return the ports of a feed-forward layer that sees the tokens at `index`."""
    (enter, leave), tokens = ends, Tokens(index)
    if enter is leave:
        return [Edit(enter, "around", tokens)]
    return [Edit(enter, "pre", tokens), Edit(leave, "post", tokens)]


@dataclass(frozen=True)
class OwnLoss:
    """The loss that the model computes itself."""

    model: Any

    def __call__(self, batch: Batch) -> Tensor:
        return self.model(**batch).loss


@dataclass(frozen=True)
class TokenLoss:
    """The loss of a model on a batch, read as `reading` says; `asked` where it is known, of a batch without padding, without a look."""

    model: Any
    reading: Reading
    asked: Asked | None = None
    widths: Widths = EXACT
    few: int | None = None

    def __call__(self, batch: Batch) -> Tensor:
        index, labels = (self.asked or self.reading.asked)(batch["labels"])
        chunks, mask = Chunks(labels), batch.get("attention_mask")
        look = self.reading.others and self.asked is None
        there = present(mask, self.widths.tokens, self.few) if look and mask is not None else None
        given = {name: value for name, value in batch.items() if name != "labels"}
        if self.reading.decodes:
            given["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(batch["labels"])
        with edited(self.model, self.reading.edits(index, chunks, there)):
            logits = self.model(**given).logits
        return cross_entropy(logits, labels) if chunks.loss is None else chunks.loss


def make_loss(model: Any, batch: Batch, inside: bool = True, widths: Widths = EXACT) -> Loss:
    """Return the cheapest loss that is the model's own on this batch of two rows, with ports `inside` the blocks or not."""
    with torch.no_grad():
        found = read_loss(model, batch)
        if found is None:
            return OwnLoss(model)
        reading, plain = found
        close = max(torch.finfo(y.dtype).eps for y in (plain.logits, plain.loss)) ** 0.5
        whole = replace(reading, others=())
        padded = "attention_mask" in batch and not batch["attention_mask"].all()  # otherwise it would not show
        ways = (reading if padded else whole, whole) if inside else ()
        for one in (*ways, replace(whole, ffn=None)):
            loss = TokenLoss(model, one, few=1)
            if torch.isclose(loss(batch).to(plain.loss.dtype), plain.loss, rtol=close, atol=close):
                return TokenLoss(model, one, widths=widths)
    return OwnLoss(model)


def read_loss(model: Any, batch: Batch) -> tuple[Reading, Any] | None:
    """Return where the loss can be read, and the model's output on the batch; None where nothing but its own loss will do."""
    reading = _reading(model)
    if reading is None:
        return None
    looks = {module: Look() for ends in reading.known for module in ends}
    with edited(model, [Edit(module, "around", look) for module, look in looks.items()]):
        plain = model(**batch)
    head, labels, inputs = looks[reading.head], batch["labels"].numel(), batch["input_ids"].numel()
    if not head.by_token(labels) or head.calls[0][0].shape[:-1] != batch["labels"].shape:
        return None
    if not all(looks[module].by_token(labels) for module in reading.ffn or ()):
        reading = replace(reading, ffn=None)
    others = tuple(ends for ends in reading.others if all(looks[module].by_token(inputs) for module in ends))
    chunked = plain.logits is head.calls[0][1] and _is_plain(reading.head)
    return replace(reading, others=others, chunked=chunked), plain


def _reading(model: Any) -> Reading | None:
    """Return where the loss of a model is read, as its anatomy and its deltas have it; None where that is not known."""
    parts = anatomy(model)
    heads = [place for place in parts.places if place.role == "head"]
    if len(heads) != 1 or not parts.stacks:
        return None
    head, first, stack = model.get_submodule(heads[0].path), parts.stacks[0], parts.stacks[-1]
    decodes = len(parts.stacks) > 1
    known = not decodes or "prepare_decoder_input_ids_from_labels" in dir(model)
    if not known or _has_pre(head):
        return None
    last, ffns = (stack.name, stack.layers - 1), [place for place in parts.places if place.role == "ffn"]
    whole = _whole(model, parts)
    ends = {place: None if _layer(place) in whole else _ends(model, place) for place in ffns}
    at_last = [ends[place] for place in ffns if _layer(place) == last]
    others = [ends[place] for place in ffns if place.stack == first.name and _layer(place) != last]
    ffn = at_last[0] if len(at_last) == 1 else None
    return Reading(head, ffn, stack.causal and not decodes, decodes, tuple(filter(None, others)))


def _layer(place: Place | Site) -> tuple[str, int | None]:
    return place.stack, place.layer


def _whole(model: Any, parts: Anatomy) -> set[tuple[str, int | None]]:
    """Return the layers that have to see all tokens: a method counts them there, or the block is run again, without these ports."""
    placements = [p for attached in attachments(model).values() for p in attached.placements]
    counting = {_layer(p.site) for p in placements if p.method.computes.acts == "positions"}
    blocks = [(place, vars(model.get_submodule(place.path))) for place in parts.blocks]
    return counting | {_layer(place) for place, own in blocks if PORTS in own and own[PORTS].around}


def _ends(model: Any, place: Place) -> Ends | None:
    """Return where a feed-forward layer begins and ends, or None where something else keeps what goes into it."""
    enter, leave = model.get_submodule(place.path), model.get_submodule(place.exit or place.path)
    return (enter, leave) if enter is leave or not _has_pre(enter) else None


def _has_pre(module: nn.Module) -> bool:
    """Whether something changes or keeps what comes into a module, before a port that is put there now."""
    return PORTS in vars(module) and bool(vars(module)[PORTS].pre)


def _is_plain(head: Any) -> bool:
    """Whether a head is a linear layer whose weight is there as it is, and nothing else acts on it."""
    held = [] if type(head) is not nn.Linear else [p for p in (head.weight, head.bias) if p is not None]
    return bool(held) and all(storage(p) is None and not (p.requires_grad or p.is_meta) for p in held)
