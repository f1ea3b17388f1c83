"""pyreft's folders, read and written: a `config.json` and one file for each intervention, of which the name says where it is.

    intkey_layer_<l>_comp_block_output_unit_pos_nunit_<n>#<k>.bin     weight [r, d], bias [r], rotate_layer [d, r] with R = its transpose

At which positions they act is decided by pyreft's data, not by its files: `positions` is what was written there, such as
"f3+l2" for the first three and the last two tokens of a prompt. A block with two files has one for each end. Whoever reads what
is written here says the positions of the delta.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from deltatune.core.method import Method
from deltatune.core.site import Anatomy, anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.files import new_folder, read_json, write_bytes, write_json
from deltatune.formats.disk import Tensors, pickle_bytes, read_tensors_of_pickle, state_dict
from deltatune.formats.guard import reading
from deltatune.formats.parts import Part, assemble
from deltatune.formats.paths import place_of
from deltatune.formats.seats import Seat, seats_of
from deltatune.methods.addition.direft import DiReFT
from deltatune.methods.addition.loreft import LoReFT
from deltatune.methods.addition.noreft import NoReFT
from deltatune.methods.combine.at_positions import AtPositions

NAMED = re.compile(r"intkey_layer_(?P<layer>\d+)_comp_(?P<component>.+?)_unit_.+?_nunit_\d+#(?P<again>\d+)\.bin")
CONFIG, COMPONENT = "config.json", "block_output"
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
    return path.is_dir() and (path / CONFIG).is_file() and any(path.glob("intkey_layer_*.bin"))


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
    kinds = str(read_json(folder / CONFIG))
    first, last = int(span["first"] or 0), int(span["last"] or 0)
    found: dict[int, dict[int, Tensors]] = {}
    for file in sorted(folder.glob("*.bin")):
        named = NAMED.fullmatch(file.name)
        if named is None or named["component"] != COMPONENT:
            raise DeltaTuneError(f"{file} is no intervention behind a block; deltatune has ReFT there alone.")
        held = state_dict(read_tensors_of_pickle(file), file)
        found.setdefault(int(named["layer"]), {})[int(named["again"])] = held
    read = []
    for layer, units in found.items():
        ends = [(first, last)] if len(units) == 1 else [(first, 0), (0, last)]
        for end, (_, held) in zip(ends, sorted(units.items()), strict=False):
            method, leaves = _reft(folder, kinds, held)
            path = place_of(parts, "block", layer).path
            read.append(Part(path, AtPositions(method, *end), leaves, role="block"))
    if not read or any(len(units) > 2 for units in found.values()):
        raise DeltaTuneError(f"{folder} holds {len(read)} interventions of which at most two may be behind one block.")
    return assemble(model, parts, read)


def _reft(folder: Path, kinds: str, held: Tensors) -> tuple[Method, Tensors]:
    """Return the method of an intervention and its leaves, by the names of its tensors and the types in the config."""
    if held.keys() == set(SUBSPACE.values()):
        leaves = {leaf: held[name] for leaf, name in SUBSPACE.items()}
        return LoReFT(len(leaves["b"])), leaves | {"R": leaves["R"].mT}
    direct, plain = KINDS[DiReFT] in kinds, KINDS[NoReFT] in kinds
    if direct == plain or not held.keys() >= set(BASES.values()):
        raise DeltaTuneError(
            f"{folder} holds an intervention of {', '.join(held)}; read are those of LoReFT, NoReFT and NodiReFT, one in a folder."
        )
    leaves = {leaf: held[name] for leaf, name in BASES.items()}
    if direct:
        return DiReFT(len(leaves["b"])), leaves
    shift = held.get("proj_layer.bias", leaves["b"].new_zeros(()))
    return NoReFT(len(leaves["b"])), leaves | {"b": leaves["b"] - shift}


def write_pyreft(model: nn.Module, weights: Weights, folder: Path | str) -> None:
    """Write weights for `model` as a new folder of pyreft, which does not hold the positions at which they act.

    Raises `DeltaTuneError`, before anything is written, for what pyreft has no intervention for.
    """
    folder, parts, seats = Path(folder), anatomy(model), seats_of(model, weights)
    methods = _checked(parts, seats)
    files: dict[str, bytes] = {}
    representations, types = [], []
    for seat in seats:
        inner, again = seat.method.inner, methods.index(seat.method)
        name = f"intkey_layer_{seat.site.layer}_comp_{COMPONENT}_unit_pos_nunit_1#{again}.bin"
        files[name] = pickle_bytes(_unit(seat), folder)
        representations.append([seat.site.layer, COMPONENT, "pos", 1, inner.rank])
        types.append(f"<class 'pyreft.interventions.{KINDS[type(inner)]}'>")
    with new_folder(folder) as new:
        for name, data in files.items():
            write_bytes(new / name, data)
        write_json(new / CONFIG, {"representations": representations, "intervention_types": types, "mode": "parallel"})


def _checked(parts: Anatomy, seats: Sequence[Seat]) -> list[Any]:
    """Return the methods in the order of their files: one for both ends of a text, or one for the first and one for the last."""
    methods = sorted({seat.method for seat in seats}, key=lambda m: isinstance(m, AtPositions) and m.last)
    for method in methods:
        if not isinstance(method, AtPositions) or type(method.inner) not in KINDS:
            raise DeltaTuneError(
                f"pyreft has LoReFT, NoReFT and DiReFT at the first and last positions; this delta has {method}: "
                "write for example AtPositions(LoReFT(), first=4)."
            )
    at = [sorted(str(s.site.layer) for s in seats if s.method == method) for method in methods]
    ends = len(methods) == 2 and methods[0].last == 0 == methods[1].first and at[0] == at[1]
    if not (len(methods) == 1 or ends) or len({type(method.inner) for method in methods}) > 1:
        raise DeltaTuneError(
            "a folder of pyreft has one kind of ReFT, with one intervention for both ends of a text or one for each, at the same "
            f"blocks; this delta has {', '.join(map(str, methods))}."
        )
    blocks = [place.path for place in parts.places if place.role == "block"]
    alone = len({place.stack for place in parts.places if place.role == "block"}) == 1
    for seat in seats:
        if not alone or seat.site.path not in blocks or seat.site.side != "out" or seat.site.exit:
            raise DeltaTuneError(
                f"pyreft's interventions are written behind the blocks of a single stack; this delta has one at {seat.site.address!r}."
            )
    if len({(seat.method, seat.site.path) for seat in seats}) < len(seats):
        raise DeltaTuneError("pyreft has one intervention at a place; this delta has the same one twice.")
    return methods


def _unit(seat: Seat) -> Tensors:
    leaves: Any = seat.unfolded
    if "R" in leaves:
        return {SUBSPACE[leaf]: tensor.mT if leaf == "R" else tensor for leaf, tensor in leaves.items()}
    return {name: leaves[leaf] for leaf, name in BASES.items()}
