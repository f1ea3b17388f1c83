"""What deltas add to a backbone's attention, through the attention function that transformers looks up by name.

A backbone whose `config._attn_implementation` is `sdpa` is set to `deltatune_sdpa` while such a delta is attached: the
same function, called with the delta's keys and values in front, and what it makes of the queries added to the result.
Keys and values come after rotary embedding and never enter the key/value cache, so cached and uncached generation agree
and a cache can be shared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.backbones.reader import RowPositions, argument_names, reader
from deltatune.core.builders import BUILDERS, Built, each
from deltatune.core.delta import Placement
from deltatune.core.leaves import Tensors
from deltatune.core.ports import PORTS, Edit, Port, Setting
from deltatune.core.site import Anatomy, Part, Site
from deltatune.errors import DeltaTuneError

NAME = "deltatune_"
# keys and values in front, [rows, heads, n, width], and which of them a row may see, [rows, n], or None for all; one row is for all
Extra = tuple[Tensor, Tensor, Tensor | None]
Caller = Callable[[nn.Module, Tensor], Tensor]


def _called(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


class AttentionPort(Port):
    """What a port may do in attention: nothing, unless it says otherwise."""

    def extra(self, key: Tensor, value: Tensor) -> Extra | None:
        """Return what is put in front of the text's keys and values."""

    def added(self, query: Tensor, scaling: float | None, call: Caller) -> Tensor | None:
        """Return what is added to the attention's output [batch, length, heads, head width]."""

    def bias(self, bias: Tensor, query: Tensor) -> Tensor:
        """Return the bias of positions [rows or 1, heads, length, keys] that the queries get."""
        return bias


class HeadsPort(AttentionPort):
    """heads: K -> [K_prefix; K], V -> [V_prefix; V]."""

    def __init__(self, site: Site, method: Any, tensors: Tensors, lookup: Lookup) -> None:
        super().__init__(site, method, tensors)
        self.lookup = lookup

    def extra(self, key: Tensor, value: Tensor) -> Extra:
        K, V = self.method.prefix(self.tensors(key.dtype), key.shape[1])
        return K[None], V[None], None


class QueriesPort(AttentionPort):
    """heads: o -> o + method.attend(p, scaled q, project), with the backbone's own projections to keys and values."""

    def __init__(self, placement: Placement, tensors: Tensors, lookup: Lookup, keys: Projection, values: Projection):
        super().__init__(placement.site, placement.method, tensors)
        self.lookup, self.keys, self.values = lookup, keys, values

    def added(self, query: Tensor, scaling: float | None, call: Caller) -> Tensor:
        q = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)

        def project(states: Tensor) -> tuple[Tensor, Tensor]:
            return self.keys(states, query, call), self.values(states, query, call)

        return self.method.attend(self.tensors(query.dtype), q, project).transpose(1, 2)


class Projection:
    """The backbone's projection to keys or to values, for states that are not in the text."""

    def __init__(self, module: nn.Module, part: Part | None) -> None:
        self.module, self.part = module, part

    def __call__(self, states: Tensor, like: Tensor, call: Caller) -> Tensor:
        """Return states [n, d] as heads [heads, n, width], as many and as wide as those of the queries `like`."""
        y = call(self.module, states)
        heads = (y if self.part is None else self.part.take(y, -1)).unflatten(-1, (-1, like.shape[-1])).transpose(0, 1)
        return heads.repeat_interleave(like.shape[1] // heads.shape[0], 0)


def extend(base: Callable[..., Any]) -> Callable[..., Any]:
    """Return the attention function `base` with the ports' keys and values in front of the batch's own."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = _bias(module, query, kwargs["position_bias"])
        extras = _extras(module, key, value)
        if not extras:
            return _answered(module, query, base(module, query, key, value, attention_mask, **kwargs), kwargs)
        keys, values, _ = zip(*extras, strict=True)
        length = sum(K.shape[2] for K in keys)
        mask = _hidden(_mask(module, query, key, attention_mask, length), query, key, extras)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (length, 0))
        y = base(module, query, torch.cat([*keys, key], 2), torch.cat([*values, value], 2), mask, **kwargs)
        return _answered(module, query, y, kwargs)

    return attention


def _bias(module: nn.Module, query: Tensor, bias: Tensor) -> Tensor:
    for port in module.__dict__[PORTS].heads if PORTS in module.__dict__ else ():
        bias = port.bias(bias, query)
    return bias


def _answered(module: nn.Module, query: Tensor, y: tuple[Tensor, Any], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Return the attention's output with what every port adds to it."""
    mixed, *rest = y
    if PORTS in module.__dict__:
        for port in module.__dict__[PORTS].heads:
            more = port.added(query, kwargs.get("scaling"), _called)
            mixed = mixed if more is None else mixed + more
    return mixed, *rest


def _extras(module: nn.Module, key: Tensor, value: Tensor) -> list[Extra]:
    """Return what every port puts in front of the text now, for every row."""
    found = []
    if PORTS in module.__dict__:
        for port in module.__dict__[PORTS].heads:
            extra = port.extra(key, value)
            if extra is not None:
                K, V, seen = extra
                found.append((rows_of(K, key), rows_of(V, value), seen if seen is None else rows_of(seen, key)))
    return found


def rows_of(held: Tensor, like: Tensor) -> Tensor:
    """Return what is held for one row, or for every row before `generate` multiplied them, for all rows of `like`."""
    if held.shape[0] == 1:
        return held.expand(like.shape[0], *held.shape[1:])
    return held if held.shape[0] == like.shape[0] else held.repeat_interleave(like.shape[0] // held.shape[0], 0)


def _mask(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, length: int) -> Tensor | None:
    """Let every query see the extra keys; a causal mask that was left implicit becomes explicit, because its shape changed."""
    if mask is not None:
        return F.pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    if query.shape[2] == 1 or not module.is_causal:
        return None
    causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(
        key.shape[2] - query.shape[2]
    )
    return F.pad(causal, (length, 0), value=True)[None, None]


def _hidden(mask: Tensor | None, query: Tensor, key: Tensor, extras: list[Extra]) -> Tensor | None:
    """Hide extra keys from the rows that have fewer of them; the mask stays what it is when all rows see all."""
    if all(seen is None for _, _, seen in extras):
        return mask
    parts = [K.new_ones(K.shape[0], K.shape[2], dtype=torch.bool) if s is None else s for K, _, s in extras]
    shown = F.pad(torch.cat(parts, 1), (0, key.shape[2]), value=True)[:, None, None]
    if mask is None:
        return shown.expand(-1, -1, query.shape[2], -1)
    return mask & shown if mask.dtype == torch.bool else mask.masked_fill(~shown, torch.finfo(mask.dtype).min)


def register(source: str, implementation: str) -> str:
    """Make `deltatune_<implementation>` known to transformers and return that name; `source` is the family's python module."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if "flash" in implementation or "flex" in implementation:
        raise DeltaTuneError(
            f"keys and values cannot be added to {implementation!r} attention; load the backbone with attn_implementation='sdpa'."
        )
    eager = implementation == "eager"
    name = NAME + implementation + ("_" + source.rpartition(".")[2] if eager else "")
    if name not in ALL_ATTENTION_FUNCTIONS:
        # every family has its own eager attention, in the file that defines its modules
        base = (
            vars(import_module(source))["eager_attention_forward"] if eager else ALL_ATTENTION_FUNCTIONS[implementation]
        )
        ALL_ATTENTION_FUNCTIONS.register(name, extend(base))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


class Lookup:
    """Where a backbone's attention function comes from; registers it again when a pickled backbone is read elsewhere."""

    def __init__(self, module: nn.Module) -> None:
        self.source = type(module).__module__
        config: Any = vars(module).get("config")
        if config is None or "ALL_ATTENTION_FUNCTIONS" not in vars(sys.modules[self.source]):
            raise DeltaTuneError(
                f"{type(module).__name__} does not look its attention function up in transformers' AttentionInterface, "
                "so keys and values cannot be added; use a method on linears or hidden states."
            )
        self.config = config
        current = config._attn_implementation or "eager"
        self.implementation = "eager" if current.startswith(f"{NAME}eager") else current.removeprefix(NAME)

    def setting(self) -> Setting:
        """Return the setting that sends the attention of this configuration through the ports."""
        return Setting(self.config, "_attn_implementation", register(self.source, self.implementation))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register(self.source, self.implementation)


def _heads(model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors) -> Built:
    module = model.get_submodule(placement.site.path)
    lookup = Lookup(module)
    edit = Edit(module, "heads", HeadsPort(placement.site, placement.method, tensors, lookup))
    return [edit, *_row_positions(model, anatomy, placement)], [lookup.setting()]


def _row_positions(model: nn.Module, anatomy: Anatomy, placement: Placement) -> list[Edit]:
    """Return what makes rotary queries turn with their place in the row, as keys at a fixed position need it."""
    stack = anatomy.stack(placement.site.stack)
    if stack.positions != "rotary":
        return []
    over = reader(model, stack)
    return [Edit(over, "pre", RowPositions(argument_names(over), placement.method))]


def _queries(model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors) -> Built:
    site = placement.site
    own = [p for p in anatomy.places if (p.stack, p.layer) == (site.stack, site.layer)]
    found = {p.role: Projection(model.get_submodule(p.path), p.part) for p in own}
    keys, values = found.get(f"{site.role}.k"), found.get(f"{site.role}.v")
    if keys is None or values is None:
        raise DeltaTuneError(
            f"{placement.method} needs the projections to keys and values of {site.path!r}, which are not known; "
            f"write a where with the role attn, as {placement.method.where!r}."
        )
    module = model.get_submodule(site.path)
    lookup = Lookup(module)
    edit = Edit(module, "heads", QueriesPort(placement, tensors, lookup, keys, values))
    return [edit, *_row_positions(model, anatomy, placement)], [lookup.setting()]


BUILDERS["heads"] = each(_heads)
BUILDERS["queries"] = each(_queries)
