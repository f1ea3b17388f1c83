"""PREFIX_TUNING and CARTRIDGE: keys and values of all attentions in one tensor, turned by their length n.

    K_peft = R(n) K        V_peft = V        prompt_embeddings: [n, layers x (K, V) x heads x width]

as peft moves the text behind them, and deltatune leaves it where it is. ADAPTION_PROMPT (LLaMA-Adapter) has states of its
own in the last attentions, without positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.delta import Delta
from deltatune.core.method import Method
from deltatune.core.site import Heads, Stack, anatomy
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.prompts import KEY, Prompt, sizes, stack_of
from deltatune.formats.seats import Seat
from deltatune.methods.addition.cartridge import Cartridge
from deltatune.methods.addition.llama_adapter import LLaMAAdapter
from deltatune.methods.addition.prefix_tuning import PrefixTuning

STATIC = ("default", "linear", "llama3")  # rotary angles that are a frequency times the position
HALVES = ("llama", "qwen2", "qwen3", "phi", "gpt_neox")  # families whose heads are turned in halves, all layers alike
GATED = ("llama", "mistral")  # families in which peft's LLaMA-Adapter is the paper's


class PrefixForm(Prompt):
    type = "PREFIX_TUNING"
    method = PrefixTuning

    def read(self, model: nn.Module, config: Config, tensors: Mapping[str, Tensor]) -> tuple[Delta, list[Tensors]]:
        E = tensors[KEY]
        n, (stack, heads) = config.whole("num_virtual_tokens", E.shape[0]), self.stack(model)
        wanted = (n, 2 * stack.layers * heads.key * heads.width)
        if tuple(E.shape) != wanted:
            raise DeltaTuneError(
                f"{KEY} has the shape {tuple(E.shape)}; a prefix of length {n} of this model has {wanted}."
            )
        method, angles = self.of(n, config), _angles(model, n)
        pieces = E.unflatten(1, (stack.layers, 2, -1)).unbind(1)
        return method.at("attn"), [
            self.leaves(method, _turn(kv[:, 0], heads.width, -angles), kv[:, 1]) for kv in pieces
        ]

    def of(self, n: int, config: Config) -> Method:
        """Return the method of a prefix of length n."""
        return PrefixTuning(n)

    def leaves(self, method: Any, K: Tensor, V: Tensor) -> Tensors:
        """Return the leaves that keys and values [n, width] are."""
        return {"K": K, "V": V}

    def pair(self, seat: Seat) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a seat."""
        return seat.leaves["K"], seat.leaves["V"]

    def settings(self, method: Any) -> dict[str, Any]:
        """Return the fields of this type."""
        return {"prefix_projection": False}

    def stack(self, model: nn.Module) -> tuple[Stack, Heads]:
        """Return the stack that peft's prefixes act on, and its heads."""
        stack, family = stack_of(model, f"peft's {self.type}", prefix=True), anatomy(model).family
        if family not in HALVES or stack.heads is None:
            raise DeltaTuneError(
                f"how {family} turns its keys is not known well enough to turn those of a prefix of peft."
            )
        return stack, stack.heads

    def write(self, model: nn.Module, seats: Sequence[Seat]) -> tuple[dict[str, Any], Tensors]:
        method, (stack, heads) = seats[0].method, self.stack(model)
        by_layer = {seat.site.layer: seat for seat in seats}
        if sorted(by_layer, key=str) != sorted(range(stack.layers), key=str) or len(seats) != stack.layers:
            raise DeltaTuneError(
                f"peft has a prefix in every attention; this delta has one in {len(seats)} of {stack.layers}."
            )
        angles = _angles(model, method.length)
        pairs = [self.pair(by_layer[i]) for i in range(stack.layers)]
        E = torch.cat([t for K, V in pairs for t in (_turn(K, heads.width, angles), V)], 1)
        width = heads.key * heads.width
        own = {"token_dim": width, "num_attention_heads": heads.key, "encoder_hidden_size": width}
        own = own if self.type == "PREFIX_TUNING" else {name: own[name] for name in list(own)[:2]}
        return {**sizes(stack, method.length), **own, **self.settings(method)}, {KEY: E}


class CartridgeForm(PrefixForm):
    type = "CARTRIDGE"
    method = Cartridge

    def of(self, n: int, config: Config) -> Method:
        return Cartridge(n, config.whole("num_frozen_tokens", 1))

    def leaves(self, method: Any, K: Tensor, V: Tensor) -> Tensors:
        both = torch.stack([K, V])
        parts = {"KV0": both[:, : method.frozen], "KV": both[:, method.frozen :]}
        return parts if method.frozen else {"KV": both}

    def pair(self, seat: Seat) -> tuple[Tensor, Tensor]:
        K, V = torch.cat([seat.leaves[leaf] for leaf in ("KV0", "KV") if leaf in seat.leaves], 1)
        return K, V

    def settings(self, method: Any) -> dict[str, Any]:
        return {"num_frozen_tokens": method.frozen}


class AdaptionForm(Prompt):
    """The keys name the attentions; peft has it in the last of them."""

    type = "ADAPTION_PROMPT"
    method = LLaMAAdapter

    def check_keys(self, tensors: Mapping[str, Tensor]) -> None:
        ends = {name.rpartition(".")[2] for name in tensors}
        if ends != {"adaption_prompt", "adaption_gate"}:
            raise DeltaTuneError(
                f"the file holds {', '.join(sorted(ends)[:3])}; an {self.type} has a prompt and a gate."
            )

    def read(self, model: nn.Module, config: Config, tensors: Mapping[str, Tensor]) -> tuple[Delta, list[Tensors]]:
        paths = self.paths(model)
        start = len(paths) - config.whole("adapter_layers", len(paths))
        wanted = {
            f"base_model.model.{path}.{end}" for path in paths[start:] for end in ("adaption_prompt", "adaption_gate")
        }
        if start < 0 or set(tensors) != wanted:
            lacking = sorted(wanted ^ set(tensors))[0] if start >= 0 else f"{len(paths) - start} layers"
            raise DeltaTuneError(
                f"{config.source} and the file do not belong together, or not to this model: {lacking!r}."
            )
        found = [
            {end: tensors[f"base_model.model.{path}.adaption_{end}"] for end in ("prompt", "gate")}
            for path in paths[start:]
        ]
        where = f"attn[{start}:]" if start else "attn"
        leaves = [{"P": own["prompt"].flatten(0, -2), "g": own["gate"].flatten()} for own in found]
        return LLaMAAdapter(len(leaves[0]["P"])).at(where), leaves

    def paths(self, model: nn.Module) -> list[str]:
        """Return the attentions of the only stack, in their order."""
        parts = anatomy(model)
        if parts.family not in GATED:
            raise DeltaTuneError(
                f"peft's {self.type} is read and written for {' and '.join(GATED)}, not for {parts.family}."
            )
        return [place.path for place in parts.places if place.role == "attn"]

    def write(self, model: nn.Module, seats: Sequence[Seat]) -> tuple[dict[str, Any], Tensors]:
        paths, own = self.paths(model), [seat.site.path for seat in seats]
        if own != paths[len(paths) - len(own) :]:
            raise DeltaTuneError(f"peft has {self.type} in the last attentions; this delta has it in {', '.join(own)}.")
        tensors = {}
        for seat in seats:
            root = f"base_model.model.{seat.site.path}.adaption"
            tensors |= {f"{root}_prompt": seat.leaves["P"][None], f"{root}_gate": seat.leaves["g"]}
        counts = {"adapter_len": seats[0].method.length, "adapter_layers": len(seats)}
        return {"task_type": "CAUSAL_LM", "target_modules": own[0].rpartition(".")[2], **counts}, tensors


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
