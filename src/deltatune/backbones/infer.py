"""The anatomy of a transformers model that no table knows, read from its structure and its modules' names.

What the structure leaves open stays out: a where that asks for such a role is an error, while a wrong guess would
silently train the wrong thing.
"""

from __future__ import annotations

from collections import Counter
from itertools import takewhile
from typing import Any, Literal

from torch import nn

from deltatune.backbones.infer_block import PACKED, Linear, attentions, block_roles
from deltatune.core.site import Anatomy, Heads, Place, Stack, is_transposed

Modules = dict[str, nn.Module]


def join(*pieces: str) -> str:
    """Join the pieces of a module path, skipping empty ones."""
    return ".".join(piece for piece in pieces if piece)


def inside(path: str, outer: str) -> bool:
    """Whether the module at `path` is a proper descendant of the one at `outer`."""
    return path != "" if outer == "" else path.startswith(f"{outer}.")


def base_path(modules: Modules, path: str) -> str:
    """Return the path of the base model inside the transformers model at `path` (itself when it has no task head)."""
    host: Any = modules[path]
    inner = join(path, host.base_model_prefix)
    return inner if host.base_model_prefix and inner in modules else path


def infer(modules: Modules, host: str) -> Anatomy | None:
    """Return what the structure tells about the transformers model at `host`; None without a list of blocks."""
    model: Any = modules[host]
    base, config, table = base_path(modules, host), model.config.get_text_config(), model.get_input_embeddings()
    embed = next((path for path, module in modules.items() if module is table and isinstance(table, nn.Embedding)), "")
    stacks: list[Stack] = []
    places: list[Place] = []
    for name, path in _towers(modules, base, embed).items():
        own = _embedding(modules, path, config) if name else embed
        stack = _stack(modules, base, path, name, own or None, config)
        stacks.append(stack)
        places += _places(modules, base, stack)
    return Anatomy(model.config.model_type, tuple(stacks), tuple(places)) if stacks else None


def _towers(modules: Modules, base: str, embed: str) -> dict[str, str]:
    """Name -> path of the lists of blocks: an encoder and a decoder, or the list nearest to the token embeddings."""
    lists: list[str] = []
    for path, module in modules.items():
        if inside(path, base) and _is_blocks(module) and not any(inside(path, outer) for outer in lists):
            lists.append(path)
    lists = [path for path in lists if attentions(_linears(modules, f"{path}.0"), cross=False)] or lists
    sides = {path: [piece for piece in path.split(".") if piece in ("encoder", "decoder")][:1] for path in lists}
    if sorted(sides.values()) == [["decoder"], ["encoder"]]:
        return {side[0]: path for path, side in sides.items()}
    shared = {path: _shared(path, embed) for path in lists}
    nearest = [path for path, length in shared.items() if length == max(shared.values())]
    return {"": nearest[0]} if len(nearest) == 1 else {}


def _shared(path: str, other: str) -> int:
    """The number of leading pieces that two paths have in common."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _is_blocks(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    # an attached block is an instance of a subclass of its own class, so the plainest class decides
    kind = min((type(child) for child in module), key=lambda t: len(t.__mro__))
    return kind is not nn.ModuleList and all(isinstance(child, kind) and list(child.parameters()) for child in module)


def _embedding(modules: Modules, blocks: str, config: Any) -> str | None:
    """The only token embedding beside these blocks."""
    around = blocks.rpartition(".")[0]
    near = {path: module for path, module in modules.items() if inside(path, around)}
    tables = [p for p, m in near.items() if isinstance(m, nn.Embedding) and m.num_embeddings == config.vocab_size]
    return tables[0] if len(tables) == 1 else None


def _stack(modules: Modules, base: str, path: str, name: str, embed: str | None, config: Any) -> Stack:
    linears = _linears(modules, f"{path}.0")
    parents = attentions(linears, cross=False)
    causal = name == "decoder" or (name == "" and _is_causal(modules, path, parents, config))
    return Stack(
        name=name,
        path=path,
        layers=sum(1 for _ in modules[path].children()),
        width=config.hidden_size,
        causal=causal,
        heads=_heads([m for m in linears if m.parent in parents], name, config),
        embed=embed,
        positions=_positions(modules, base),
        prompt_at=0 if causal or name else 1,
    )


def _is_causal(modules: Modules, path: str, parents: list[str], config: Any) -> bool:
    told = getattr(modules[join(path, "0", parents[0])], "is_causal", None) if parents else None
    if isinstance(told, bool):
        return told
    from transformers.models.auto import modeling_auto as auto

    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in causal and config.model_type not in masked


def _heads(linears: list[Linear], name: str, config: Any) -> Heads | None:
    """The config's geometry, when the rows of the projections agree with it."""
    count = getattr(config, f"{name}_attention_heads", None) or getattr(config, "num_attention_heads", None)
    if not isinstance(count, int):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // count
    heads = Heads(count, getattr(config, "num_key_value_heads", None) or count, width)
    rows = {"q": heads.query * width, "k": heads.key * width, "v": heads.key * width}
    packed = {m.d_out for m in linears if m.name in PACKED}
    agrees = all(m.d_out == rows[what] for m in linears for what in rows if m.called(what))
    return heads if agrees and packed <= {sum(rows.values())} else None


def _positions(modules: Modules, base: str) -> Literal["rotary", "learned", "bias"]:
    """How positions enter; without a sign of rotation or of a table, they are taken to act inside the attention."""
    near = {path.rpartition(".")[2]: module for path, module in modules.items() if inside(path, base)}
    if any("rotary" in type(module).__name__.lower() for module in near.values()):
        return "rotary"
    if any(name in ("relative_attention_bias", "rel_attn_bias") for name in near):
        return "bias"
    return "learned" if any("posit" in name or "pos_emb" in name or name == "wpe" for name in near) else "bias"


def _places(modules: Modules, base: str, stack: Stack) -> list[Place]:
    places = [Place("embed", stack.embed, stack.name)] if stack.embed else []
    found: list[Place] = []
    for layer in range(stack.layers):
        path = f"{stack.path}.{layer}"
        places.append(Place("block", path, stack.name, layer))
        roles = block_roles(_linears(modules, path), stack.width, stack.heads)
        found += [Place(role, join(path, at), stack.name, layer, part) for role, at, part in roles]
        found += [Place("norm", norm, stack.name, layer) for norm in _norms(modules, path)]
    # every block has a feed-forward: where some are not recognised, or have experts besides, the rest is not the whole
    count = Counter(place.role for place in found)
    whole = {role for role in count if count[role] == stack.layers and not _has_experts(modules[stack.path])}
    places += [place for place in found if not place.role.startswith("ffn") or place.role in whole]
    # in a model of two stacks, what lies beside a stack's blocks is that stack's
    around = stack.path.rpartition(".")[0] if stack.name else base
    outside = [norm for norm in _norms(modules, around) if not inside(norm, stack.path)]
    return places + [Place("norm", norm, stack.name) for norm in outside]


def _has_experts(blocks: nn.Module) -> bool:
    return any(parameter.dim() > 2 for parameter in blocks.parameters())


def _norms(modules: Modules, outer: str) -> list[str]:
    near = [(path, module) for path, module in modules.items() if inside(path, outer)]
    named = [(path, module) for path, module in near if "norm" in type(module).__name__.lower()]
    return [path for path, module in named if not list(module.children()) and list(module.parameters())]


def _linears(modules: Modules, block: str) -> list[Linear]:
    found: list[Linear] = []
    for path, module in modules.items():
        if inside(path, block):
            name, weight = path[len(block) + 1 :], dict(module.named_parameters(recurse=False)).get("weight")
            if isinstance(module, nn.Linear):
                found.append(Linear(name, module.in_features, module.out_features))
            elif is_transposed(module) and weight is not None:
                found.append(Linear(name, weight.shape[0], weight.shape[1], transposed=True))
    return found
