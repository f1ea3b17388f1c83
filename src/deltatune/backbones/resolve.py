"""From a live transformers model to its anatomy: by its family's table, else by its structure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from deltatune.backbones.anatomies import Family, Packed, Role, Tower, families
from deltatune.backbones.infer import Modules, base_path, infer, inside, join
from deltatune.backbones.sublayers import with_spans
from deltatune.core import walk
from deltatune.core.site import Anatomy, Heads, Part, Place, Stack, is_transposed

PRETRAINED = "transformers.modeling_utils.PreTrainedModel"
TASK_HEADS = ("score", "classifier", "classification_head", "qa_outputs", "discriminator_predictions", "cls")


def resolve(model: nn.Module) -> Anatomy | None:
    """Return the anatomy of the transformers model that `model` is or contains, with paths from `model`.

    None when there is no such model, when there are several, or when nothing in it is recognised.
    """
    modules = {p: m for p, m in walk.modules(model).items() if p.split(".")[0] != "deltas"}
    hosts = {path: _model_type(module) for path, module in modules.items() if _is_pretrained(module)}
    outer = _outermost(list(hosts))
    known = _outermost([path for path, model_type in hosts.items() if model_type in families()])
    if len(outer) != 1:
        return None
    found = by_table(modules, known[0], families()[hosts[known[0]]]) if len(known) == 1 else None
    found = found or infer(modules, outer[0])
    return _with_head(replace(found, places=with_spans(found.places)), modules, outer[0]) if found else None


def _is_pretrained(module: nn.Module) -> bool:
    return any(f"{c.__module__}.{c.__qualname__}" == PRETRAINED for c in type(module).__mro__)


def _model_type(module: Any) -> str:
    return module.config.model_type


def _outermost(paths: list[str]) -> list[str]:
    return [path for path in paths if not any(inside(path, other) for other in paths)]


def by_table(modules: Modules, path: str, family: Family) -> Anatomy | None:
    """Return what the family's table tells about the model at `path`; None when it has none of the family's stacks."""
    host: Any = modules[path]
    base = base_path(modules, path)
    stacks: list[Stack] = []
    places: list[Place] = []
    for tower in family.towers:
        if isinstance(modules.get(join(base, tower.blocks)), nn.ModuleList):
            stack = _stack(modules, base, tower, host.config)
            stacks.append(stack)
            places += _places(modules, base, tower, stack)
    return Anatomy(host.config.model_type, tuple(stacks), tuple(places)) if stacks else None


def _stack(modules: Modules, base: str, tower: Tower, config: Any) -> Stack:
    width, heads = getattr(config, tower.width), getattr(config, tower.heads)
    kv_heads, head_width = getattr(config, tower.kv_heads, None), getattr(config, tower.head_width, None)
    path, embed = join(base, tower.blocks), join(base, tower.embed)
    return Stack(
        name=tower.name,
        path=path,
        layers=sum(1 for _ in modules[path].children()),
        width=width,
        causal=getattr(config, tower.causal) if isinstance(tower.causal, str) else tower.causal,
        heads=Heads(heads, kv_heads or heads, head_width or width // heads),
        embed=embed if embed in modules else None,
        positions=tower.positions,
        prompt_at=tower.prompt_at,
    )


def _places(modules: Modules, base: str, tower: Tower, stack: Stack) -> list[Place]:
    places = [Place("embed", stack.embed, stack.name)] if stack.embed else []
    for layer in range(stack.layers):
        block = f"{stack.path}.{layer}"
        places.append(Place("block", block, stack.name, layer))
        for role, where in tower.roles.items():
            found = _find(modules, block, where, stack.heads)
            places += [Place(role, path, stack.name, layer, part) for path, part in found]
    final = [join(base, norm) for norm in tower.norms]
    return places + [Place("norm", path, stack.name) for path in final if path in modules]


def _find(modules: Modules, block: str, where: Role, heads: Heads | None) -> list[tuple[str, Part | None]]:
    if isinstance(where, tuple):
        return [pair for path in where for pair in _find(modules, block, path, heads)]
    path = _absolute(modules, block, where.path if isinstance(where, Packed) else where)
    if path not in modules:
        return []
    part = where.part(_rows(modules[path]), heads) if isinstance(where, Packed) and heads else None
    return [(path, part)]


def _absolute(modules: Modules, block: str, path: str) -> str:
    for piece in path.split("."):
        last = sum(1 for _ in modules[block].children()) - 1 if piece == "-1" else piece
        block = f"{block}.{last}"
    return block


def _rows(module: Any) -> int:
    # a quantised linear layer's weight may be stored flat, so its declared width counts
    return module.weight.shape[1] if is_transposed(module) else module.out_features


def _with_head(found: Anatomy, modules: Modules, path: str) -> Anatomy:
    host: Any = modules[path]
    output = host.get_output_embeddings()
    heads = [name for name, module in modules.items() if module is output]
    heads += [join(path, name) for name in TASK_HEADS if join(path, name) in modules]
    if not heads:
        return found
    return replace(found, places=(*found.places, Place("head", heads[0], found.stacks[-1].name)))
