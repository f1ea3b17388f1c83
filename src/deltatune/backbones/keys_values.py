"""What a causal backbone's attentions make of a text: keys and values, as evidence for methods that start from them.

The text stands before position 0 where positions are rotary, and shares the first positions where they are learned, as a
soft prompt does: what follows it keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltatune.backbones.reader import reader
from deltatune.core.site import anatomy
from deltatune.errors import DeltaTuneError


@torch.no_grad()
def keys_values(model: nn.Module, ids: Sequence[int]) -> dict[str, Tensor]:
    """Return {path of an attention: its keys and values [2, n, d_kv]} for the token ids of a text.

    Raises `DeltaTuneError` for a backbone without a causal stack, or without tokens.
    """
    parts = anatomy(model)
    stack = next((s for s in parts.stacks if s.causal), None)
    if stack is None or stack.positions == "bias":
        raise DeltaTuneError(
            f"a text's keys and values come from a causal stack with rotary or learned positions; this {parts.family} has none."
        )
    if not len(ids):
        raise DeltaTuneError("there are no token ids, so there are no keys and values; give a text with words.")
    first = -len(ids) if stack.positions == "rotary" else 0
    over = reader(model, stack)
    device = next(over.parameters()).device
    positions = torch.arange(first, first + len(ids), device=device)[None]
    cache = over(
        input_ids=torch.tensor([list(ids)], device=device), position_ids=positions, use_cache=True
    ).past_key_values
    found = {}
    for place in parts.places:
        if place.role == "attn" and place.stack == stack.name and place.layer is not None:
            layer = cache.layers[place.layer]
            pair = torch.stack([layer.keys[0], layer.values[0]])  # [2, heads, n, width]
            found[place.path] = pair.transpose(1, 2).flatten(2).float().cpu()
    return found
