"""What prefixes, prompts, queries and positions of different deltas become when each has its own rows of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.backbones.attention import AttentionPort, Caller, Extra, HeadsPort, Lookup, QueriesPort
from deltatune.backbones.positions import Positions, PositionsPort, prompting
from deltatune.backbones.prompts import CausalPrompt, CrossMask, EncoderPrompt, Prompt, PromptHeads
from deltatune.backbones.reader import RowPositions, by_name
from deltatune.core.calls import Ports, run
from deltatune.core.ports import PORTS, Call, Edit, Setting
from deltatune.core.rows import Rows
from deltatune.core.site import anatomy
from deltatune.core.together import (
    ROWLESS,
    TOGETHER,
    Fusion,
    Joint,
    ModuleRows,
    Rowless,
    Share,
    StreamRows,
    Together,
    Whole,
)


class PrefixRows(Together, AttentionPort):
    """heads: keys and values in front, as many as each row has; the shorter ones are filled up and hidden."""

    def __init__(self, shares: list[Share], fusion: Fusion) -> None:
        super().__init__(shares, fusion)
        live = [t for share in shares for t in share.port.tensors.live().values()]
        self.learning = any(t.requires_grad for t in live)
        self.kept: Extra | None = None

    def extra(self, key: Tensor, value: Tensor) -> Extra:
        if self.learning:
            return self._filled(key, value)
        if self.kept is None or self.kept[0].dtype != key.dtype:
            self.kept = self._filled(key, value)
        return self.kept

    def _filled(self, key: Tensor, value: Tensor) -> Extra:
        own = [share.port.extra(key, value) for share in self.shares]
        lengths = [K.shape[2] for K, _, _ in own]
        K, V = (self._spread([held[i] for held in own], max(lengths)) for i in (0, 1))
        own_of = lengths_of([share.rows for share in self.shares], lengths, key.device)
        return K, V, torch.arange(max(lengths), device=key.device)[None] < own_of

    def _spread(self, held: list[Tensor], longest: int) -> Tensor:
        filled = [F.pad(t, (0, 0, 0, longest - t.shape[2])) for t in held]
        pieces = [t.expand(share.rows.count, -1, -1, -1) for t, share in zip(filled, self.shares, strict=True)]
        return self.split.join(pieces, filled[0].new_zeros(self.split.total, *filled[0].shape[1:]))


class QueriesRows(Together, AttentionPort):
    """heads: what each port makes of its rows' queries is added to their attention's output."""

    def added(self, query: Tensor, scaling: float | None, call: Caller) -> Tensor:
        pieces = [share.port.added(share.rows.take(query), scaling, _as_alone(share)) for share in self.shares]
        return self.split.join(pieces, torch.zeros_like(query.transpose(1, 2)))


def _as_alone(share: Share) -> Caller:
    """Return what calls a module through the ports of one share's delta."""

    def call(module: nn.Module, x: Tensor) -> Tensor:
        own = share.whole.get(module) or Ports(module)
        return run(own, (x,), {}) if PORTS in module.__dict__ else module(x)

    return call


class TableRows(ModuleRows):
    """around a table of position biases, looked up once for all rows: [queries, keys, heads] of each delta side by side."""

    def part(self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        return args, kwargs

    def whole(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces, -1)


class BiasRows(AttentionPort):
    """heads: each row takes its own delta's biases [heads, queries, keys] out of those that a table gave side by side."""

    def __init__(self, table: TableRows) -> None:
        self.method, self.split = table.method, table.split
        runs = [rows for rows, _, _ in table.runs]
        self.group = torch.zeros(self.split.total, dtype=torch.long, device=runs[0].at.device)
        for index, rows in enumerate(runs):
            self.group[rows.at] = index

    def bias(self, bias: Tensor, query: Tensor) -> Tensor:
        heads, times = query.shape[1], query.shape[0] // self.split.total
        if bias.shape[1] == heads:
            return bias
        return bias[0].unflatten(0, (-1, heads)).index_select(0, self.group.repeat_interleave(times))


def _attentions(model: nn.Module, table: str) -> list[nn.Module]:
    """Return the attentions that use a table of position biases: all those of its stack."""
    parts = anatomy(model)
    stack = next(place.stack for place in parts.places if place.path == table.rpartition(".")[0])
    return [model.get_submodule(p.path) for p in parts.places if p.role == "attn" and p.stack == stack]


def _table(module: nn.Module, deltas: list[tuple[Rows, Whole]], fusion: Fusion) -> list[Edit]:
    rows = TableRows(module, deltas, fusion)
    port = next(port for _, whole in deltas for _, ports in whole[module].param for port in ports)
    users = _attentions(fusion.model, port.site.path)
    biases = BiasRows(rows)
    return [Edit(module, "around", rows), *(Edit(user, "heads", biases) for user in users)]


def _table_settings(model: nn.Module, table: str) -> list[Setting]:
    return [Lookup(attention).setting() for attention in _attentions(model, table)]


class Prompts(Prompt):
    """The prompts of a route: each row's own, filled up to the longest."""

    def __init__(self, shares: list[Share], fusion: Fusion) -> None:
        self.prompts = [share.port.prompt for share in shares]
        first, own = self.prompts[0], [prompt.length for prompt in self.prompts]
        self.site, self.method, self.stack = first.site, first.method, first.stack
        self.embed, self.blocks, self.names, self.padding = first.embed, first.blocks, first.names, first.padding
        self.layers, self.running, self.ragged, self.length = {}, False, True, max(own)
        self.rows, self.split = [share.rows for share in shares], fusion.split(shares)
        self.own = lengths_of(self.rows, own, fusion.device)

    def embeddings(self, dtype: torch.dtype) -> Tensor:
        own = [prompt.embeddings(dtype) for prompt in self.prompts]
        filled = [F.pad(tokens, (0, 0, 0, self.length - tokens.shape[1])) for tokens in own]
        pieces = [t.expand(rows.count, -1, -1) for t, rows in zip(filled, self.rows, strict=True)]
        return self.split.join(pieces, filled[0].new_zeros(self.split.total, *filled[0].shape[1:]))

    def lengths(self, device: torch.device) -> Tensor:
        return self.own.to(device)

    def keep(self, path: str, key: Tensor, value: Tensor) -> None:
        self.layers[path] = (key, value, torch.arange(self.length, device=key.device)[None] < self.own)


def lengths_of(rows: list[Rows], lengths: list[int], device: torch.device) -> Tensor:
    """Return the length that each row of a route has, [rows, 1], and 0 for rows of nobody."""
    own = torch.zeros(rows[0].total, 1, dtype=torch.long, device=device)
    for part, length in zip(rows, lengths, strict=True):
        own[part.at] = length
    return own


def prompts_of(shares: list[Share], fusion: Fusion) -> Any:
    """Return the prompt that these shares' ports have together; every module of a route has the same."""
    key = tuple(id(share.port.prompt) for share in shares)
    return fusion.once(("prompts", key), lambda: Prompts(shares, fusion))


class PositionsRows(Together):
    """pre and post on the reader: each share keeps the positions of its own rows."""

    def __init__(self, shares: list[Share], fusion: Fusion) -> None:
        super().__init__(shares, fusion)
        for share in shares:
            share.port.check(share.here)

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        names: Any = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        for share in self.shares:
            given = by_name(share.port.names, args, kwargs)
            own = {n: share.rows.take(v) if n in names and v is not None else v for n, v in given.items()}
            share.port.keep(own, prompting(here))
        return args, kwargs

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        if prompting(here):
            for share in self.shares:
                share.port.restore()
        return y


def _same(shares: list[Share], fusion: Fusion) -> Any:
    return shares[0].port


def _causal(shares: list[Share], fusion: Fusion) -> CausalPrompt:
    return CausalPrompt(prompts_of(shares, fusion))


def _prompt_heads(shares: list[Share], fusion: Fusion) -> PromptHeads:
    return PromptHeads(prompts_of(shares, fusion), shares[0].port.path, shares[0].port.lookup)


def _encoder(shares: list[Share], fusion: Fusion) -> EncoderPrompt:
    return EncoderPrompt(prompts_of(shares, fusion), shares[0].port.at)


def _cross(shares: list[Share], fusion: Fusion) -> CrossMask:
    return CrossMask(prompts_of(shares, fusion), shares[0].port.names, shares[0].port.at)


ROWLESS["relative_attention_bias"] = Rowless(_table, _table_settings)
TOGETHER[EncoderPrompt] = Joint(_encoder, 0)
TOGETHER[CausalPrompt] = Joint(_causal, 0)
TOGETHER[CrossMask] = Joint(_cross, 1)
TOGETHER[RowPositions] = Joint(_same, 2)
TOGETHER[Positions] = Joint(PositionsRows, 3)
TOGETHER[PromptHeads] = Joint(_prompt_heads, 0)
TOGETHER[HeadsPort] = Joint(PrefixRows, 1)
TOGETHER[QueriesPort] = Joint(QueriesRows, 2)
TOGETHER[PositionsPort] = Joint(StreamRows)
