"""Extra keys and values in a backbone's attention, through the attention function that transformers looks up by name.

A backbone whose `config._attn_implementation` is `sdpa` is set to `deltatune_sdpa` while such a delta is attached: the
same function, called with the delta's keys and values in front. They come after rotary embedding and never enter the
key/value cache, so cached and uncached generation agree and a cache can be shared.
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
from deltatune.core.delta import Placement
from deltatune.core.ports import BUILDERS, PORTS, Edit, Port, Setting, Tensors
from deltatune.core.site import Anatomy, Site
from deltatune.errors import DeltaTuneError

NAME = "deltatune_"


class HeadsPort(Port):
    """heads: K -> [K_prefix; K], V -> [V_prefix; V]."""

    def __init__(self, site: Site, method: Any, tensors: Tensors, lookup: Lookup) -> None:
        super().__init__(site, method, tensors)
        self.lookup = lookup

    def extra(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        K, V = self.method.prefix(self.tensors(key.dtype), key.shape[1])
        return K[None], V[None]


def extend(base: Callable[..., Any]) -> Callable[..., Any]:
    """Return the attention function `base` with the ports' keys and values in front of the batch's own."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        keys, values = _extras(module, key, value)
        if not keys:
            return base(module, query, key, value, attention_mask, **kwargs)
        length = sum(K.shape[2] for K in keys)
        mask = _mask(module, query, key, attention_mask, length)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (length, 0))
        return base(module, query, torch.cat([*keys, key], 2), torch.cat([*values, value], 2), mask, **kwargs)

    return attention


def _extras(module: nn.Module, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the keys and the values of every port that has some now, for every row."""
    keys, values = [], []
    if PORTS in module.__dict__:
        for port in module.__dict__[PORTS].heads:
            extra = port.extra(module, key, value)
            if extra is not None:
                keys.append(extra[0].expand(key.shape[0], -1, -1, -1))
                values.append(extra[1].expand(value.shape[0], -1, -1, -1))
    return keys, values


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


def _heads(
    model: nn.Module, anatomy: Anatomy, placement: Placement, tensors: Tensors
) -> tuple[list[Edit], list[Setting]]:
    module = model.get_submodule(placement.site.path)
    lookup = Lookup(module)
    edits = [Edit(module, "heads", HeadsPort(placement.site, placement.method, tensors, lookup))]
    stack = anatomy.stack(placement.site.stack)
    if stack.positions == "rotary":
        over = reader(model, stack)
        edits.append(Edit(over, "pre", RowPositions(argument_names(over), placement.method)))
    return edits, [lookup.setting()]


BUILDERS["heads"] = _heads
