"""pyreft's folders, read: a `config.json` and one file for each intervention, of which the name says where it is.

    intkey_layer_<l>_comp_block_output_unit_pos_nunit_<n>#<k>.bin     weight [r, d], bias [r], rotate_layer [d, r] with R = its transpose

At which positions they act is decided by pyreft's data, not by its files: `positions` is what was written there, such as
"f3+l2" for the first three and the last two tokens of a prompt. A block with two files has one for each end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from deltatune.core.method import Method
from deltatune.core.site import anatomy
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.files import read_json
from deltatune.formats.disk import Tensors, read_tensors_of_pickle, state_dict
from deltatune.formats.guard import reading
from deltatune.formats.parts import Part, assemble
from deltatune.formats.paths import place_of
from deltatune.methods.addition.direft import DiReFT
from deltatune.methods.addition.loreft import LoReFT
from deltatune.methods.addition.noreft import NoReFT
from deltatune.methods.combine.at_positions import AtPositions

NAMED = re.compile(r"intkey_layer_(?P<layer>\d+)_comp_(?P<component>.+?)_unit_.+?_nunit_\d+#(?P<again>\d+)\.bin")
POSITIONS = re.compile(r"(?:f(?P<first>\d+))?\+?(?:l(?P<last>\d+))?")


def is_pyreft(path: Path) -> bool:
    """Whether a path is a folder of pyreft."""
    return path.is_dir() and (path / "config.json").is_file() and any(path.glob("intkey_layer_*.bin"))


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
    kinds = str(read_json(folder / "config.json"))
    first, last = int(span["first"] or 0), int(span["last"] or 0)
    found: dict[int, dict[int, Tensors]] = {}
    for file in sorted(folder.glob("*.bin")):
        named = NAMED.fullmatch(file.name)
        if named is None or named["component"] != "block_output":
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
    if held.keys() == {"weight", "bias", "rotate_layer"}:
        return LoReFT(len(held["bias"])), {"W": held["weight"], "b": held["bias"], "R": held["rotate_layer"].mT}
    direct, plain = "NodireftIntervention" in kinds, "NoreftIntervention" in kinds
    names: Any = {"W1": "learned_source.weight", "b": "learned_source.bias", "W2": "proj_layer.weight"}
    if direct == plain or not held.keys() >= set(names.values()):
        raise DeltaTuneError(
            f"{folder} holds an intervention of {', '.join(held)}; read are those of LoReFT, NoReFT and NodiReFT, one in a folder."
        )
    leaves = {leaf: held[name] for leaf, name in names.items()}
    if direct:
        return DiReFT(len(leaves["b"])), leaves
    shift = held.get("proj_layer.bias", leaves["b"].new_zeros(()))
    return NoReFT(len(leaves["b"])), leaves | {"b": leaves["b"] - shift}
