"""PROMPT_TUNING, P_TUNING and PREFIX_TUNING: one tensor `prompt_embeddings`, and positions that have to agree.

peft puts prompts in front of the text and counts the text's positions from behind them; deltatune leaves the text's
positions as they are (docs/design/soft-prompts.md). Where positions are rotary, only differences of them matter, and the
two are the same function: of prompts as they are, of prefixes with keys turned by their length n,

    K_peft = R(n) K        V_peft = V        prompt_embeddings: [n, layers x (K, V) x heads x width]

T5's encoder has no positions that a prompt could shift. Elsewhere the functions differ, and reading and writing is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.delta import Delta, place
from deltatune.core.fit import check_tensors
from deltatune.core.site import Stack, anatomy
from deltatune.core.weights import Weights, fingerprint
from deltatune.errors import DeltaTuneError
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.form import Seat, Tensors
from deltatune.methods.addition.prefix_tuning import PrefixTuning
from deltatune.methods.addition.prompt_tuning import PromptTuning

PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
WRITTEN = (PromptTuning, PrefixTuning)
KEY = "prompt_embeddings"
STATIC = ("default", "linear", "llama3")  # rotary angles that are a frequency times the position
HALVES = ("llama", "qwen2", "qwen3", "phi", "gpt_neox")  # families whose heads are turned in halves, all layers alike


def read_prompt(model: nn.Module, config: Config, tensors: Mapping[str, Tensor]) -> Weights:
    """Return the weights of a prompt or prefix; raises `DeltaTuneError` where it is another function than peft's."""
    if set(tensors) != {KEY}:
        raise DeltaTuneError(
            f"the file holds {', '.join(sorted(tensors)[:3])}; a {config.type} of peft holds {KEY!r} alone."
        )
    stack, E = _stack(model, config.type), tensors[KEY]
    n = config.whole("num_virtual_tokens", E.shape[0])
    if config.type == "PREFIX_TUNING":
        return _read_prefix(model, stack, E, n)
    if E.shape not in ((n, stack.width), (2 * n, stack.width)):
        raise DeltaTuneError(f"{KEY} has the shape {tuple(E.shape)}; {n} tokens of this model are {(n, stack.width)}.")
    delta = PromptTuning(n).at("input.embed")
    return _weights(model, delta, [{"P": E[:n].contiguous()}])  # on an encoder-decoder peft has rows that it never uses


def _read_prefix(model: nn.Module, stack: Stack, E: Tensor, n: int) -> Weights:
    heads = stack.heads
    assert heads is not None  # _stack checks it
    wanted = (n, 2 * stack.layers * heads.key * heads.width)
    if tuple(E.shape) != wanted:
        raise DeltaTuneError(
            f"{KEY} has the shape {tuple(E.shape)}; a prefix of length {n} of this model has {wanted}."
        )
    pieces = E.unflatten(1, (stack.layers, 2, -1)).unbind(1)
    angles = _angles(model, n)
    leaves = [{"K": _turn(kv[:, 0], heads.width, -angles), "V": kv[:, 1].contiguous()} for kv in pieces]
    return _weights(model, PrefixTuning(n).at("attn"), leaves)


def _weights(model: nn.Module, delta: Delta, leaves: list[Tensors]) -> Weights:
    placements = place(model, delta)
    pairs = zip(placements, leaves, strict=True)
    weights = Weights(delta, {p.name(leaf): t for p, own in pairs for leaf, t in own.items()}, fingerprint(model))
    check_tensors(weights, placements)
    return weights


def write_prompt(model: nn.Module, seats: list[Seat]) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the tensor of a prompt, or of the prefixes of all attentions."""
    method = seats[0].method
    kind = "PREFIX_TUNING" if isinstance(method, PrefixTuning) else "PROMPT_TUNING"
    stack = _stack(model, kind)
    heads = stack.heads
    sizes = {"num_virtual_tokens": method.length, "num_transformer_submodules": 1, "num_layers": stack.layers}
    task = "CAUSAL_LM" if stack.causal else "SEQ_2_SEQ_LM"
    config = {"peft_type": kind, "task_type": task, "token_dim": stack.width, **sizes}
    config["num_attention_heads"] = heads.query if heads else 1
    if kind == "PROMPT_TUNING":
        if seats[0].site.path != stack.embed or len(seats) > 1:
            raise DeltaTuneError(
                f"peft has prompts at the input of the first stack; this delta has {method} at {seats[0].site.path!r}."
            )
        return {**config, "prompt_tuning_init": "RANDOM"}, {KEY: seats[0].leaves["P"]}
    assert heads is not None  # _stack checks it
    by_layer = {seat.site.layer: seat for seat in seats}
    if sorted(by_layer, key=str) != sorted(range(stack.layers), key=str) or len(seats) != stack.layers:
        raise DeltaTuneError(
            f"peft has a prefix in every attention; this delta has one in {len(seats)} of {stack.layers}."
        )
    angles = _angles(model, method.length)
    pieces = [
        (_turn(by_layer[i].leaves["K"], heads.width, angles), by_layer[i].leaves["V"]) for i in range(stack.layers)
    ]
    width = heads.key * heads.width
    sizes = {
        "token_dim": width,
        "num_attention_heads": heads.key,
        "encoder_hidden_size": width,
        "prefix_projection": False,
    }
    return {**config, **sizes}, {KEY: torch.cat([t for pair in pieces for t in pair], 1)}


def _stack(model: nn.Module, kind: str) -> Stack:
    """Return the stack that peft's prompts act on; raises `DeltaTuneError` where theirs are another function than ours."""
    parts = anatomy(model)
    stacks = list(parts.stacks)
    if not stacks:
        raise DeltaTuneError(f"the stacks of {parts.family} are not known, so no {kind} of peft can be placed in it.")
    rotary = len(stacks) == 1 and stacks[0].causal and stacks[0].positions == "rotary"
    if kind == "PREFIX_TUNING" and rotary and (parts.family not in HALVES or stacks[0].heads is None):
        raise DeltaTuneError(
            f"how {parts.family} turns its keys is not known well enough to turn those of a prefix of peft."
        )
    if rotary or (kind != "PREFIX_TUNING" and len(stacks) == 2 and stacks[0].positions == "bias"):
        return stacks[0]
    raise DeltaTuneError(
        f"peft's {kind} moves the positions of the text in {parts.family}, and deltatune's does not: on its "
        f"{'two stacks' if len(stacks) > 1 else stacks[0].positions + ' positions'} they are different functions. "
        "Train it with deltatune."
    )


def _angles(model: nn.Module, n: int) -> Tensor:
    """Return the angles by which the model turns a key at position n, one for each pair of features."""
    found = [
        (module, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and not name.startswith("original")
    ]
    own: dict[str, Any] = vars(found[0][0]) if found else {}
    if len(found) != 1 or own.get("rope_type", "default") not in STATIC or own.get("attention_scaling", 1.0) != 1.0:
        raise DeltaTuneError(
            "this model's rotary positions are scaled or differ by layer, so peft's prefixes are not ours there."
        )
    return found[0][1].detach().to("cpu", torch.float64) * n


def _turn(keys: Tensor, width: int, angles: Tensor) -> Tensor:
    """Return keys [n, heads width] turned by the angles, feature i of a head's first half with i of its second."""
    turned = 2 * len(angles)
    heads = keys.unflatten(1, (-1, width)).double()
    one, two, rest = heads.split([len(angles), len(angles), width - turned], -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1).flatten(1).to(keys.dtype)
