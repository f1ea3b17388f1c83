"""From weights to a folder of OpenDelta: one delta_type with one set of settings, and its tensors by the backbone's own names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from deltatune.core.site import Anatomy, anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.files import write_bytes, write_json
from deltatune.formats.disk import Tensors, pickle_bytes
from deltatune.formats.opendelta import ACTIVATIONS, BOTTLENECK, CONFIG, FACTORS, PROMPT, SAMPLERS, TENSORS
from deltatune.formats.peft.prompts import stack_of
from deltatune.formats.seats import Seat, seats_of
from deltatune.methods.addition.adapter import Adapter
from deltatune.methods.addition.compacter import Compacter
from deltatune.methods.addition.low_rank_adapter import LowRankAdapter
from deltatune.methods.addition.parallel_adapter import ParallelAdapter
from deltatune.methods.addition.prompt_tuning import PromptTuning
from deltatune.methods.reparameterization.lora import LoRA
from deltatune.methods.specification.bitfit import BitFit

VERSION = "0.3.0"  # what 0.3.2, whose layout this is, calls itself
EXCLUDED = "lm_head"  # by its LoRA, whatever the config says
Found = tuple[dict[str, Any], Tensors]  # the fields of the type, and a seat's tensors by their whole names
Writer = Callable[[nn.Module, Anatomy, Seat], Found]


def write_opendelta(model: nn.Module, weights: Weights, folder: Path | str) -> None:
    """Write weights for `model` as a folder of OpenDelta.

    Raises `DeltaTuneError`, before anything is written, for what its one delta_type and one set of settings cannot say.
    """
    folder, parts, seats = Path(folder), anatomy(model), seats_of(model, weights)
    kind, writer = _type_of(seats)
    fields: dict[str, Any] = {}
    tensors: Tensors = {}
    for seat in seats:
        _check(seat)
        own, held = writer(model, parts, seat)
        if fields and own != fields:
            raise DeltaTuneError(f"OpenDelta has one set of settings in a folder; {own} is not {fields}.")
        if held.keys() & tensors.keys():
            raise DeltaTuneError(
                f"OpenDelta has one {kind} at a module here; this delta has several at {seat.site.path!r}."
            )
        fields, tensors = own, tensors | held
    settings = vars(vars(model)["config"]) if "config" in vars(model) else {}
    config = {
        "delta_type": kind,
        "modified_modules": [path for seat in seats for path in _ends(seat)],
        "exclude_modules": [],
        "common_structure": False,
        "backbone_class": type(model).__name__,
        "backbone_checkpoint_name": settings.get("_name_or_path") or "",
        "backbone_hash": None,  # of OpenDelta's own making; without one it does not compare
        "opendelta_version": VERSION,
        "transformers_version": settings.get("transformers_version"),
    }
    data = pickle_bytes(tensors, folder)
    write_bytes(folder / TENSORS, data)
    write_json(folder / CONFIG, config | fields)


def _type_of(seats: list[Seat]) -> tuple[str, Writer]:
    methods = list(dict.fromkeys(type(seat.method) for seat in seats))
    if len(methods) == 1 and methods[0] in WRITERS:
        return WRITERS[methods[0]]
    raise DeltaTuneError(
        f"OpenDelta has one delta_type in a folder, and none for {' + '.join(m.__name__ for m in methods)}; written is one of "
        f"{', '.join(m.__name__ for m in WRITERS)}."
    )


def _ends(seat: Seat) -> list[str]:
    """Return the modules that a seat changes; of a parallel adapter, which OpenDelta has from one to another, both."""
    path = seat.site.path
    return [path, seat.site.exit or path] if isinstance(seat.method, ParallelAdapter) else [path]


def _check(seat: Seat) -> None:
    """Raise `DeltaTuneError` for a seat that is not the output of one whole module, or that has leaves which are not trained."""
    site = seat.site
    open_ended = site.exit and not isinstance(seat.method, ParallelAdapter)
    if site.part is not None or open_ended or site.side != "out" or site.ties or not site.path:
        raise DeltaTuneError(
            f"OpenDelta changes what whole modules return; this delta has {seat.method} at {site.address!r}."
        )
    fixed = [name for name, leaf in seat.method.leaves(site).items() if not leaf.trained]
    if fixed:
        raise DeltaTuneError(
            f"OpenDelta keeps what it trains alone; {seat.method} has fixed leaves beside it: {', '.join(fixed)}."
        )


def _under(path: str, name: str, held: Tensors) -> Tensors:
    return {f"{path}.{name}.{key}": tensor for key, tensor in held.items()}


def _activation(seat: Seat, name: str) -> str:
    for theirs, ours in ACTIVATIONS.items():
        if ours == name:
            return theirs
    known = ", ".join(dict.fromkeys(ACTIVATIONS.values()))
    raise DeltaTuneError(f"OpenDelta has no activation for {seat.method}; written are {known}.")


def _reduction(seat: Seat) -> int:
    factor = seat.site.width // seat.method.size
    if not factor or seat.site.width // factor != seat.method.size:
        raise DeltaTuneError(
            f"OpenDelta divides the width {seat.site.width} of {seat.site.path!r} by a whole number; {seat.method} has a size that "
            "no such number gives."
        )
    return factor


def _lora(model: nn.Module, parts: Anatomy, seat: Seat) -> Found:
    if seat.site.kind != "linear" or seat.site.transposed or seat.leaves.keys() != FACTORS.keys():
        raise DeltaTuneError(
            f"OpenDelta has LoRA of two factors at linear layers stored [out, in]; this delta has {seat.method} at "
            f"{seat.site.address!r}."
        )
    if seat.site.path.startswith(EXCLUDED):
        raise DeltaTuneError(f"OpenDelta leaves out {EXCLUDED!r}, where this delta has {seat.method}.")
    held = {name: seat.unfolded[leaf] for leaf, name in FACTORS.items()}
    fields = {"lora_r": seat.method.rank, "lora_alpha": seat.method.alpha, "lora_dropout": 0.0}
    return fields, _under(seat.site.path, "lora", held)


def _adapter(model: nn.Module, parts: Anatomy, seat: Seat) -> Found:
    fields = {"bottleneck_dim": seat.method.size, "non_linearity": _activation(seat, seat.method.activation)}
    return fields, _under(seat.site.path, "adapter", {name: seat.leaves[leaf] for leaf, name in BOTTLENECK.items()})


def _parallel(model: nn.Module, parts: Anatomy, seat: Seat) -> Found:
    """Return the adapter with its scale in U and u: OpenDelta's config has one, and its model does not take it."""
    by: Any = seat.leaves.get("scale", seat.method.scale)
    held = {name: seat.leaves[leaf] * (by if leaf in "Uu" else 1) for leaf, name in BOTTLENECK.items()}
    fields = {"bottleneck_dim": seat.method.size, "non_linearity": _activation(seat, seat.method.activation)}
    return fields, _under(seat.site.path, "parallel_adapter", held)


def _compacter(model: nn.Module, parts: Anatomy, seat: Seat) -> Found:
    held, n = {}, seat.method.n
    for leaf, side in SAMPLERS.items():
        own = {"phm_rule": "A", "W_left": f"{leaf}s", "W_right": f"{leaf}t", "b": leaf.lower()}
        held |= {f"{side}.{name}": seat.leaves[ours] for name, ours in own.items()}
    fields = {"non_linearity": _activation(seat, "gelu_tanh"), "reduction_factor": _reduction(seat)}
    shape = {"hypercomplex_division": n, "phm_rank": seat.method.rank, "factorized_phm": True, "shared_phm_rule": False}
    return fields | shape, _under(seat.site.path, "compactor", held)


def _low_rank(model: nn.Module, parts: Anatomy, seat: Seat) -> Found:
    if seat.method.rank != 1:
        raise DeltaTuneError(f"OpenDelta computes a low_rank_adapter of rank 1 alone; this delta has {seat.method}.")
    held = {}
    for leaf, side in SAMPLERS.items():
        own = {
            "W_left": seat.leaves[f"{leaf}2"].mT,
            "W_right": seat.leaves[f"{leaf}1"].mT,
            "b": seat.leaves[leaf.lower()],
        }
        held |= {f"{side}.{name}": tensor for name, tensor in own.items()}
    fields = {"non_linearity": _activation(seat, "gelu_tanh"), "reduction_factor": _reduction(seat)}
    return fields | {"low_rank_rank": seat.method.rank}, _under(seat.site.path, "low_rank_adapter", held)


def _bitfit(model: nn.Module, parts: Anatomy, seat: Seat) -> Found:
    if "bias" not in seat.own:
        raise DeltaTuneError(
            f"{seat.site.path!r} has no bias of its own, where this delta has {seat.method}: OpenDelta adds none to a linear layer, "
            "and loses those of other modules when it loads them."
        )
    return {}, {f"{seat.site.path}.bias": seat.own["bias"].detach().float().cpu() + seat.leaves["b"]}


def _prompt(model: nn.Module, parts: Anatomy, seat: Seat) -> Found:
    stack = stack_of(model, "OpenDelta's soft_prompt")
    if seat.site.path != stack.embed:
        raise DeltaTuneError(
            f"OpenDelta has a prompt at {stack.embed!r} alone; this delta has one at {seat.site.address!r}."
        )
    at = f"{stack.path.rpartition('.')[0]}." if len(parts.stacks) > 1 else ""  # the encoder, or the whole model
    return {"soft_token_num": seat.method.length}, {f"{at}{PROMPT}": seat.leaves["P"]}


WRITERS: dict[type, tuple[str, Writer]] = {
    LoRA: ("lora", _lora),
    Adapter: ("adapter", _adapter),
    ParallelAdapter: ("parallel_adapter", _parallel),
    Compacter: ("compacter", _compacter),
    LowRankAdapter: ("low_rank_adapter", _low_rank),
    BitFit: ("bitfit", _bitfit),
    PromptTuning: ("soft_prompt", _prompt),
}
