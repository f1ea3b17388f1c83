"""LORA on parameters that hold one matrix for every expert (`target_parameters`).

    ...experts.lora_A.weight: [E r, in], expert by expert     ...experts.lora_B.weight: [out, r E], expert fastest

The keys do not name the parameter: a module's first one stands innermost, `...experts.base_layer.lora_A.weight`. peft 0.17
and 0.18 took the second dimension of every parameter for its input, so that where it is the output the two factors of each
expert are transposed and swapped. Shapes tell, and where a matrix is square, the version that peft writes since 0.18.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.form import agree
from deltatune.formats.seats import Seat
from deltatune.methods.combine.per_expert import PerExpert
from deltatune.methods.reparameterization.lora import LoRA

LEVEL = ".base_layer"
PAIR = ("lora_A.weight", "lora_B.weight")


def take_experts(model: nn.Module, config: Config, held: dict[str, Tensors]) -> list[tuple[str, str, Tensors]]:
    """Take the tensors of experts out of `held`; return them with the path of their module and the name of their parameter."""
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    levels: dict[str, dict[int, Tensors]] = {}
    for path in list(held):
        inner = path.replace(LEVEL, "")
        if inner in modules and held[path].keys() == set(PAIR) and _stacked(modules[inner]):
            levels.setdefault(inner, {})[path.count(LEVEL)] = held.pop(path)
    found = []
    for path, own in levels.items():
        names = _targeted(config, path, _stacked(modules[path]))
        if sorted(own) != list(range(len(names))):
            raise DeltaTuneError(
                f"the file holds {len(own)} pairs of factors for {path!r}, whose parameters are {', '.join(names)}; "
                f"{config.source} says target_parameters={config.get('target_parameters')!r}."
            )
        found += [(path, name, own[len(names) - 1 - i]) for i, name in enumerate(names)]
    return found


def _stacked(module: nn.Module) -> list[str]:
    return [name for name, tensor in module.named_parameters(recurse=False) if tensor.dim() == 3]


def _targeted(config: Config, path: str, names: list[str]) -> list[str]:
    """Return those of a module's parameters that the config names, in the order of the module."""
    said = config.get("target_parameters", names)
    return [name for name in names if any(f".{path}.{name}".endswith(f".{target}") for target in said)]


def expert_part(model: nn.Module, rank: int, alpha: float, config: Config, path: str, name: str, held: Tensors) -> Part:
    """Return the factors of a parameter's experts as `PerExpert(LoRA)`."""
    A, B = (held[suffix] for suffix in PAIR)
    theta, transposed = model.get_parameter(f"{path}.{name}"), is_transposed(model.get_submodule(path))
    count = theta.shape[0]
    d_in, d_out = theta.shape[1:] if transposed else theta.shape[:0:-1]
    key = f"{path}.{name}"
    agree(config, "r", key, A.shape[0] // count if A.shape[0] % count == 0 else 0, rank)
    own = {"A": A.unflatten(0, (count, rank)), "B": B.unflatten(1, (rank, count)).permute(2, 0, 1)}
    if _swapped(config, key, (A.shape[1], B.shape[0]), (d_in, d_out), transposed):
        own = {"A": own["B"].mT, "B": own["A"].mT}
    method = PerExpert(LoRA(rank, alpha), only=name, transposed=transposed)
    return Part(path, method, {f"{name}.{leaf}": tensor for leaf, tensor in own.items()})


def is_transposed(module: nn.Module) -> bool:
    """Whether a module of experts says that it stores its weights [experts, in, out]."""
    return bool(getattr(module, "is_transposed", False))


def _swapped(config: Config, key: str, found: tuple[int, int], wanted: tuple[int, int], transposed: bool) -> bool:
    """Whether the file has input and output exchanged; raises `DeltaTuneError` when nothing tells."""
    if found not in (wanted, wanted[::-1]):
        raise DeltaTuneError(
            f"the factors of {key!r} are for {found[0]} inputs and {found[1]} outputs; this model has {wanted[0]} and {wanted[1]}."
        )
    if transposed or wanted[0] != wanted[1]:
        return found != wanted
    version = re.match(r"0\.(\d+)", str(config.get("peft_version", "")))
    if version is None:
        raise DeltaTuneError(
            f"the experts' matrices of {key!r} are square, and {config.source} does not say which peft wrote it: 0.17 exchanges "
            'input and output, 0.19 and later do not. Add "peft_version": "0.17.0" or "0.19.0", whichever it was.'
        )
    return int(version[1]) < 19


def write_experts(seats: Sequence[Seat]) -> Tensors:
    """Return the tensors of `PerExpert(LoRA)` seats, nested as peft nests them."""
    modules: dict[str, list[Seat]] = {}
    for seat in seats:
        modules.setdefault(seat.site.path, []).append(seat)
    tensors: Tensors = {}
    for path, own in modules.items():
        order = list(own[0].own)
        for depth, seat in enumerate(sorted(own, key=lambda seat: -order.index(seat.site.tensor or ""))):
            A, B = seat.leaves["A"], seat.leaves["B"]
            pair = (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))
            tensors |= {f"{path}{LEVEL * depth}.{suffix}": t for suffix, t in zip(PAIR, pair, strict=True)}
    return tensors


def plain_experts(seats: Sequence[Seat]) -> list[Seat]:
    """Return the seats of `PerExpert(LoRA)` with the LoRA as their method."""
    for seat in seats:
        if type(seat.method.inner) is not LoRA or set(seat.leaves) != {"A", "B"}:
            raise DeltaTuneError(
                f"peft has LoRA alone on the weights of experts; this delta has {seat.method} at {seat.site.path!r}."
            )
    return [replace(seat, method=seat.method.inner) for seat in seats]


def target_parameters(model: nn.Module, seats: Sequence[Seat]) -> list[str]:
    """Return the shortest ends of names that find exactly these parameters."""
    wanted = {f"{seat.site.path}.{seat.site.tensor}" for seat in seats}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for depth in range(1, 1 + max(name.count(".") + 1 for name in wanted)):
        ends = {".".join(name.split(".")[-depth:]) for name in wanted}
        if {name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)} == wanted:
            return sorted(ends)
    return sorted(wanted)


def experts_of(seats: Sequence[Seat]) -> tuple[list[Seat], list[Seat]]:
    """Return the seats at experts and the others."""
    return [s for s in seats if isinstance(s.method, PerExpert)], [
        s for s in seats if not isinstance(s.method, PerExpert)
    ]
