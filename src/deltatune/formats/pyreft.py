"""pyreft's folders, read and written: a `config.json` and one file for each intervention, of which the name says where it is.

    intkey_layer_<l>_comp_block_output_unit_pos_nunit_1#<k>.bin     k = 1 for a second one at the same place
    intkey_comp_<path, _ for .>_output_unit_pos_nunit_1#<k>.bin     where the component is a path such as model.layers[3].output
    LoReFT      weight [r, d], bias [r], rotate_layer [d, r] with R = its transpose
    others      learned_source.weight [r, d] and .bias [r], proj_layer.weight [r, d], and two buffers with d

At which positions they act is decided by pyreft's data, not by its files: `positions` is what was written there, such as
"f3+l2" for the first three and the last two tokens of a prompt. A block with two files has one for each end. Whoever reads what
is written here says the positions of the delta. pyreft's own `ReftModel.load` makes LoReFT alone, in half precision, and in the
families of which it knows the blocks; others load with `load_state_dict` into interventions that are made as for training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.core.method import Method
from deltatune.core.site import Anatomy, anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.files import new_folder, read_json, write_bytes, write_json
from deltatune.formats.disk import Tensors, pickle_bytes, read_tensors_of_pickle, state_dict
from deltatune.formats.guard import reading
from deltatune.formats.parts import Part, assemble
from deltatune.formats.paths import place_of, resolve, role_at
from deltatune.formats.refts import refts_of
from deltatune.formats.seats import Seat, seats_of
from deltatune.methods.addition.direft import DiReFT
from deltatune.methods.addition.loreft import LoReFT
from deltatune.methods.addition.noreft import NoReFT
from deltatune.methods.combine.at_positions import AtPositions

CONFIG, COMPONENT = "config.json", "block_output"
KNOWN = ("gemma", "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "qwen2")  # whose blocks pyreft has a name for
KINDS: dict[type[Method], str] = {
    LoReFT: "LoreftIntervention",
    NoReFT: "NoreftIntervention",
    DiReFT: "NodireftIntervention",
}
SUBSPACE = {"W": "weight", "b": "bias", "R": "rotate_layer"}
BASES = {"W1": "learned_source.weight", "b": "learned_source.bias", "W2": "proj_layer.weight"}
POSITIONS = re.compile(r"(?:f(?P<first>\d+))?\+?(?:l(?P<last>\d+))?")


def is_pyreft(path: Path) -> bool:
    """Whether a path is a folder of pyreft."""
    return path.is_dir() and (path / CONFIG).is_file() and any(path.glob("intkey_*.bin"))


def read_pyreft(model: nn.Module, folder: Path | str, check: bool = True, positions: str | None = None) -> Weights:
    """Read a folder of pyreft as weights for `model`; raises `DeltaTuneError` when the positions are not said."""
    with reading("pyreft", folder):
        return _read_weights(model, Path(folder), positions)


def _read_weights(model: nn.Module, folder: Path, positions: str | None) -> Weights:
    parts = anatomy(model)
    span = POSITIONS.fullmatch(positions or "")
    if not positions or span is None:
        raise DeltaTuneError(
            f"{folder} is of pyreft, whose files do not say at which positions they act; found positions={positions!r}: read it by "
            'formats.read_pyreft(model, folder, positions="f1+l1"), for the first and the last token, say.'
        )
    first, last = int(span["first"] or 0), int(span["last"] or 0)
    config, found = read_json(folder / CONFIG), {}
    for spot, kind in zip(config["representations"], config["intervention_types"], strict=True):
        layer, component, unit, count = spot[:4]
        path = _block(model, parts, layer, str(component))
        if not path or (unit, count) != ("pos", 1):
            raise DeltaTuneError(
                f"{folder} has an intervention on {count} {unit} of {component!r}; deltatune has ReFT at positions behind blocks."
            )
        units: list[tuple[Method, Tensors]] = found.setdefault(path, [])
        file = folder / _file(layer, component, len(units))
        units.append(_reft(file, str(kind), state_dict(read_tensors_of_pickle(file), file)))
    read = []
    for path, units in found.items():
        ends = [(first, last)] if len(units) == 1 else [(first, 0), (0, last)]
        for end, (method, leaves) in zip(ends, units, strict=False):
            read.append(Part(path, AtPositions(method, *end), leaves, role="block"))
    if not read or any(len(units) > 2 for units in found.values()):
        raise DeltaTuneError(f"{folder} holds {len(read)} interventions of which at most two may be behind one block.")
    return assemble(model, parts, read)


def _block(model: nn.Module, parts: Anatomy, layer: int, component: str) -> str:
    """Return the block behind which a component is, or an empty string."""
    if component == COMPONENT:
        return place_of(parts, "block", layer).path
    path, _, side = component.rpartition(".")
    path = re.sub(r"\[(\d+)\]", r".\1", path) if side == "output" else ""
    return resolve(model, path) if path and role_at(parts, resolve(model, path), "block") else ""


def _component(parts: Anatomy, path: str) -> str:
    """Return pyreft's name for the output of a block."""
    return COMPONENT if parts.family in KNOWN else re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", path) + ".output"


def _file(layer: int, component: str, again: int) -> str:
    at = f"comp_{component.replace('.', '_')}" if "." in component else f"layer_{layer}_comp_{component}"
    return f"intkey_{at}_unit_pos_nunit_1#{again}.bin"


def _reft(file: Path, kind: str, held: Tensors) -> tuple[Method, Tensors]:
    """Return the method of an intervention and its leaves, by its type in the config and the names of its tensors."""
    method = next((method for method, name in KINDS.items() if kind.removesuffix("'>").endswith(f".{name}")), None)
    names = SUBSPACE if method is LoReFT else BASES
    if method is None or not held.keys() >= set(names.values()):
        raise DeltaTuneError(
            f"{file} holds a {kind} of {', '.join(held)}; read are those of LoReFT, NoReFT and NodiReFT, whole."
        )
    leaves = {leaf: held[name] for leaf, name in names.items()}
    if method is LoReFT:
        return LoReFT(len(leaves["b"])), leaves | {"R": leaves["R"].mT}
    if method is DiReFT:
        return DiReFT(len(leaves["b"])), leaves
    shift = held.get("proj_layer.bias", leaves["b"].new_zeros(()))
    return NoReFT(len(leaves["b"])), leaves | {"b": leaves["b"] - shift}


def write_pyreft(model: nn.Module, weights: Weights, folder: Path | str) -> None:
    """Write weights for `model` as a new folder of pyreft, which does not hold the positions at which they act.

    Raises `DeltaTuneError`, before anything is written, for what pyreft has no intervention for.
    """
    folder, parts, seats = Path(folder), anatomy(model), seats_of(model, weights)
    methods = refts_of(seats, "pyreft", tuple(KINDS))
    layers = _layers(parts, seats)
    files: dict[str, bytes] = {}
    spots, types = [], []
    for again, method in enumerate(methods):
        inner: Any = method.inner
        for site, unit in ((seat.site, _unit(seat)) for seat in seats if seat.method == method):
            layer, component = layers[site.path], _component(parts, site.path)
            files[_file(layer, component, again)] = pickle_bytes(unit, folder)
            spots.append([layer, component, "pos", 1, inner.rank])
            types.append(f"<class 'pyreft.interventions.{KINDS[type(inner)]}'>")
    config = {
        "representations": spots,
        "intervention_types": types,
        "intervention_dimensions": [seat.site.width for seat in seats],
        "intervention_constant_sources": [True] * len(seats),
        "sorted_keys": [name.removeprefix("intkey_").removesuffix(".bin") for name in files],
        "mode": "parallel",
    }
    with new_folder(folder) as new:
        for name, data in files.items():
            write_bytes(new / name, data)
        write_json(new / CONFIG, config)


def _layers(parts: Anatomy, seats: Sequence[Seat]) -> dict[str, int]:
    """Return the numbers of blocks by their paths; raises `DeltaTuneError` for a seat that is not behind one of the only stack."""
    blocks = parts.blocks
    layers = {place.path: place.layer or 0 for place in blocks}
    alone = len({place.stack for place in blocks}) == 1
    for seat in seats:
        if not alone or seat.site.path not in layers or seat.site.side != "out" or seat.site.exit:
            raise DeltaTuneError(
                f"pyreft's interventions are written behind the blocks of a single stack; this delta has one at {seat.site.address!r}."
            )
    return layers


def _unit(seat: Seat) -> Tensors:
    leaves: Any = seat.unfolded
    if "R" in leaves:
        return {SUBSPACE[leaf]: tensor.mT if leaf == "R" else tensor for leaf, tensor in leaves.items()}
    width = {name: torch.tensor(seat.site.width) for name in ("embed_dim", "interchange_dim")}
    return width | {name: leaves[leaf] for leaf, name in BASES.items()}
