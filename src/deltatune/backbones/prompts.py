"""Soft prompts: extra input embeddings in front of a stack, with the caller's inputs and outputs keeping their shapes.

Causal stack. What the prompt's tokens compute depends on nothing but themselves, so they run once, as a batch of one, and
every layer's keys and values are put in front of the batch's own by the attention function. They stand before position 0
(rotary) or share the first positions (learned), so the batch keeps its positions, its mask and its cache.

Bidirectional stack. The prompt joins every row; the mask grows with it. An encoder of an encoder-decoder hands the longer
states on, and the decoder's mask over them grows too; an encoder alone gives its rows back without the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbones.attention import AttentionPort, Extra, Lookup, rows_of
from deltatune.backbones.insert import insert, remove, starts
from deltatune.backbones.reader import RowPositions, argument_names, by_name, reader
from deltatune.core.builders import BUILDERS, Built, each
from deltatune.core.calls import Ports
from deltatune.core.delta import Placement
from deltatune.core.leaves import Tensors
from deltatune.core.ports import Call, Edit, Port
from deltatune.core.recompute import keeping
from deltatune.core.site import Anatomy, Stack
from deltatune.errors import DeltaTuneError


class Prompt(Port):
    """The prompt of one stack: its tokens, and on a causal stack what every layer made of them in the current sequence."""

    def __init__(self, placement: Placement, tensors: Tensors, stack: Stack, model: nn.Module) -> None:
        super().__init__(placement.site, placement.method, tensors)
        self.stack = stack
        self.embed: Any = model.get_submodule(placement.site.path)
        self.blocks: list[Any] = list(model.get_submodule(stack.path).children())
        self.names = argument_names(reader(model, stack))
        self.layers: dict[str, Extra] = {}
        self.running = False
        self.ragged = False  # whether rows have prompts of their own
        self.padding = padding_of(model, stack)
        with torch.no_grad():
            self.length = self.method.tokens(tensors(torch.float32)).shape[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "layers": {}}  # they belong to a graph, and the next sequence makes them anew

    def embeddings(self, dtype: torch.dtype) -> Tensor:
        """Return the prompt as [1, length, d], or as [rows, length, d] where rows have their own."""
        return self.method.tokens(self.tensors(dtype))[None]

    def lengths(self, device: torch.device) -> Tensor:
        """Return how many of the `length` tokens are whose: [1, 1], or [rows, 1] where rows have their own."""
        return torch.full((1, 1), self.length, device=device)

    def keep(self, path: str, key: Tensor, value: Tensor) -> None:
        """Keep what one attention made of the prompt's tokens, [rows, heads, length, width] each."""
        self.layers[path] = (key, value, None)

    @contextmanager
    def pass_of_its_own(self) -> Iterator[None]:
        """The scope in which the layers' keys and values are the prompt's, to be kept."""
        kept = [layer for layer in self.blocks if vars(layer).get("gradient_checkpointing")]
        self.running = True
        for layer in kept:  # the pass is short, and recomputing a block later would find the prompt not running
            layer.gradient_checkpointing = False
        try:
            with keeping(self.blocks):
                yield
        finally:
            self.running = False
            for layer in kept:
                layer.gradient_checkpointing = True


def padding_of(model: nn.Module, stack: Stack) -> int | None:
    """Return the id from which a stack counts its positions, over tokens that have another one (RoBERTa), or None elsewhere."""
    beside = (stack.embed or "").rpartition(".")[0]
    table: Any = model.get_submodule(beside)._modules.get("position_embeddings") if beside else None
    return table.padding_idx if isinstance(table, nn.Embedding) else None


def counted(ids: Tensor, padding: int) -> Tensor:
    """Return the positions that such a stack gives token ids [batch, length], which it cannot tell from their embeddings."""
    real = ids.ne(padding).long()
    return real.cumsum(1) * real + padding


class CausalPrompt:
    """pre on a causal stack: run the prompt once when a sequence starts."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt, self.method = prompt, prompt.method

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        prompts = [port.prompt for port in here.pre if isinstance(port, CausalPrompt)]
        if any(prompt.running for prompt in prompts):
            return args, kwargs
        past = by_name(self.prompt.names, args, kwargs).get("past_key_values")
        if past is None or past.get_seq_length() == 0 or not self.prompt.layers:
            for prompt in prompts[prompts.index(self.prompt) :]:
                prompt.layers.clear()
            self._run(here.module)
        return args, kwargs

    def _run(self, module: nn.Module) -> None:
        prompt = self.prompt
        tokens = prompt.embeddings(prompt.embed.weight.dtype)
        lengths = prompt.lengths(tokens.device)
        first = -lengths if prompt.stack.positions == "rotary" else torch.zeros_like(lengths)
        positions = first + torch.arange(tokens.shape[1], device=tokens.device)[None]
        with prompt.pass_of_its_own():
            module(inputs_embeds=tokens, position_ids=positions, use_cache=False)


class PromptHeads(AttentionPort):
    """heads on each attention of a causal stack: keep the prompt's own keys and values, then put them in front."""

    def __init__(self, prompt: Prompt, path: str, lookup: Lookup) -> None:
        self.prompt, self.method, self.path, self.lookup = prompt, prompt.method, path, lookup

    def extra(self, key: Tensor, value: Tensor) -> Extra | None:
        if self.prompt.running:
            self.prompt.keep(self.path, key, value)
            return None
        if self.path not in self.prompt.layers:  # another prompt in front of this one is having its own pass
            return None
        K, V, seen = self.prompt.layers[self.path]
        return K.to(key.dtype), V.to(value.dtype), seen


class EncoderPrompt:
    """pre on a bidirectional stack: put the prompt into every row; post on an encoder alone: take it out again."""

    def __init__(self, prompt: Prompt, at: int) -> None:
        self.prompt, self.method, self.at = prompt, prompt.method, at

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        given = by_name(self.prompt.names, args, kwargs)
        ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        if embeds is None:
            embeds = self.prompt.embed(ids)
            if self.prompt.padding is not None and given.get("position_ids") is None:
                given["position_ids"] = counted(ids, self.prompt.padding)
        tokens = rows_of(self.prompt.embeddings(embeds.dtype), embeds)
        lengths = rows_of(self.prompt.lengths(embeds.device), embeds)
        if given.get("attention_mask") is None and self.prompt.ragged:
            given["attention_mask"] = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        start = starts(given.get("attention_mask"), embeds, self.at)
        longer = {name: self._longer(name, value, tokens.shape[1], start, lengths) for name, value in given.items()}
        return (), {**longer, "inputs_embeds": insert(embeds, tokens, start, lengths)}

    def _longer(self, name: str, value: Any, length: int, start: Tensor, own: Tensor) -> Any:
        if name not in ("attention_mask", "token_type_ids", "position_ids") or value is None:
            return value
        if value.dim() != 2:
            raise DeltaTuneError(
                f"a soft prompt needs {name} as [batch, length]; found the shape {tuple(value.shape)}."
            )
        if name == "position_ids":
            behind = torch.arange(value.shape[1], device=value.device)[None] >= start
            first = torch.where(start > 0, value.gather(1, (start - 1).clamp(min=0)) + 1, value[:, :1])
            steps = first + torch.minimum(torch.arange(length, device=value.device)[None], (own - 1).clamp(min=0))
            return insert(value + own * behind, steps, start, own)
        steps = torch.arange(length, device=value.device)[None]
        return insert(value, ((steps < own) & (name == "attention_mask")).to(value.dtype), start, own)

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        ports = [port for port in here.post if isinstance(port, EncoderPrompt)]
        embeds = kwargs["inputs_embeds"]  # as long as all prompts make it; those of earlier ports are out already
        longer = embeds.shape[1] - sum(port.prompt.length for port in ports[: ports.index(self)])
        start = starts(kwargs.get("attention_mask"), embeds, self.at)
        own = rows_of(self.prompt.lengths(embeds.device), embeds)
        return _cut(y, longer, lambda h: remove(h, self.prompt.length, start, own))


def _cut(y: Any, longer: int, without: Callable[[Tensor], Tensor]) -> Any:
    """Take the prompt out of every tensor [batch, longer, ...] of a model output, which is changed in place."""
    if isinstance(y, Tensor):
        return without(y) if y.dim() > 2 and y.shape[1] == longer else y
    if isinstance(y, dict):
        for name in list(y):
            y[name] = _cut(y[name], longer, without)
        return y
    return tuple(_cut(item, longer, without) for item in y) if isinstance(y, tuple) else y


class CrossMask:
    """pre on the decoder over a prompted encoder: its mask over the encoder's states grows by the prompt."""

    def __init__(self, prompt: Prompt, names: tuple[str, ...], at: int) -> None:
        self.prompt, self.method, self.names, self.at = prompt, prompt.method, names, at

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        given = by_name(self.names, args, kwargs)
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is None or (mask is None and not self.prompt.ragged):
            return (), given
        if mask is None:  # the first prompt of several sees states that all of them made longer
            ports = [port for port in here.pre if isinstance(port, CrossMask)]
            more = sum(port.prompt.length for port in ports[ports.index(self) :])
            mask = states.new_ones(states.shape[0], states.shape[1] - more, dtype=torch.long)
        if mask.dim() == 2 and states.shape[1] > mask.shape[1]:
            own = rows_of(self.prompt.lengths(mask.device), mask)
            shown = (torch.arange(self.prompt.length, device=mask.device)[None] < own).to(mask.dtype)
            given["encoder_attention_mask"] = insert(mask, shown, starts(mask, mask, self.at), own)
        return (), given


def _tokens(model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors) -> Built:
    stack = anatomy.stack(placement.site.stack)
    module = reader(model, stack)
    prompt = Prompt(placement, tensors, stack, model)
    if stack.causal:
        return _causal(model, anatomy, prompt, module)
    decoder = next((s for s in anatomy.stacks if s.causal), None)
    port = EncoderPrompt(prompt, stack.prompt_at)
    if decoder is None:
        return [Edit(module, "pre", port), Edit(module, "post", port)], []
    over = reader(model, decoder)
    return [Edit(module, "pre", port), Edit(over, "pre", CrossMask(prompt, argument_names(over), stack.prompt_at))], []


def _causal(model: nn.Module, anatomy: Anatomy, prompt: Prompt, module: nn.Module) -> Built:
    if prompt.stack.positions == "bias" or any(place.role == "cross" for place in anatomy.places):
        raise DeltaTuneError(
            f"{prompt.method} on the decoder of this {anatomy.family} is not supported;"
            f" its default place, the encoder's input, is {prompt.method.where!r}."
        )
    edits, settings = [Edit(module, "pre", CausalPrompt(prompt))], []
    if prompt.stack.positions == "rotary":
        edits.append(Edit(module, "pre", RowPositions(prompt.names, prompt.method)))
    for place in anatomy.places:
        if place.role == "attn" and place.stack == prompt.stack.name:
            attention = model.get_submodule(place.path)
            lookup = Lookup(attention)
            edits.append(Edit(attention, "heads", PromptHeads(prompt, place.path, lookup)))
            settings.append(lookup.setting())
    return edits, settings


BUILDERS["tokens"] = each(_tokens)
