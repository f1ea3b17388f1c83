"""Weights: a delta's numbers for one backbone, as named tensors, a spec and the backbone's fingerprint.

On disk: `delta.safetensors`, whose header holds the spec as JSON, and a readable copy of it, `delta.json`.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Generator, Tensor, nn

from deltatune.core.delta import Delta, Placement, as_delta, parse, place
from deltatune.core.leaf import Given, Held
from deltatune.core.method import Method
from deltatune.core.stored import Values, codes, shape
from deltatune.core.walk import parameters, submodule
from deltatune.errors import DeltaTuneError
from deltatune.files import write_bytes, write_json

FORMAT = "deltatune-1"
SAMPLES = 64  # values of each parameter that the fingerprint looks at
PICKLED = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a backbone: a hash of its parameter names and shapes, and one of a sample of its values.

    The sample is taken in bfloat16, so that a backbone keeps its fingerprint when it is loaded in another float type; of a
    quantised parameter it is one of what is stored.
    """

    family: str
    structure: str
    values: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as a JSON object."""
        return {"family": self.family, "structure": self.structure, "values": self.values}

    @staticmethod
    def from_json(value: Any) -> Fingerprint:
        """Read a fingerprint; raises `DeltaTuneError` when the object is not one."""
        kinds = {"family": str, "structure": str, "values": str | None}
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            raise DeltaTuneError(f"a backbone's fingerprint has the keys {', '.join(kinds)}; found {value!r}.")
        for name, kind in kinds.items():
            if not isinstance(value[name], kind):
                raise DeltaTuneError(f"the {name} of a backbone's fingerprint is a text; found {value[name]!r}.")
        return Fingerprint(**value)


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return the fingerprint of a backbone, without what deltas add to it."""
    shapes, samples, known = hashlib.sha256(), [], True
    seen: set[int] = set()
    for name, tensor in parameters(model):
        if name.startswith("deltas.") or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        shapes.update(f"{name}{list(shape(tensor))}".encode())
        known = known and not (tensor.is_meta or tensor.is_complex())
        if known:
            flat = codes(tensor).detach().reshape(-1)
            samples.append(flat.index_select(0, _picked(flat.numel(), flat.device)).to("cpu", torch.bfloat16))
    family = next(kind.__name__ for kind in type(model).__mro__ if "forward" in vars(kind))  # FSDP2 adds a subclass
    if not known:
        return Fingerprint(family, shapes.hexdigest()[:16], None)
    values = torch.cat([*samples, torch.empty(0, dtype=torch.bfloat16)]).view(torch.int16).numpy().tobytes()
    return Fingerprint(family, shapes.hexdigest()[:16], hashlib.sha256(values).hexdigest()[:16])


@lru_cache(maxsize=256)
def _picked(size: int, device: torch.device) -> Tensor:
    """Return the places of the values that the fingerprint looks at."""
    return torch.linspace(0, size - 1, min(SAMPLES, size), dtype=torch.float64).long().to(device)


@dataclass(frozen=True)
class Weights:
    """A delta's numbers: `tensors` by the names of `Placement.name`, for the backbone of `backbone`.

    `fixed` holds the leaves that are stored and not trained; the other untrained ones `seed` regenerates, unless `fixed`
    has them too: then they came from elsewhere (another library's file) and hold instead.
    """

    delta: Delta
    tensors: Mapping[str, Tensor]
    backbone: Fingerprint
    seed: int = 0
    notes: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of trained parameters."""
        return sum(t.numel() for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """The size of the tensors in bytes."""
        return sum(t.numel() * t.element_size() for t in self.held.values())

    @property
    def held(self) -> dict[str, Tensor]:
        """All tensors that travel, trained or fixed."""
        return {**self.tensors, **self.fixed}

    def spec(self) -> dict[str, Any]:
        """Return everything but the numbers, as JSON."""
        return {
            "format": FORMAT,
            "delta": self.delta.to_json(),
            "text": str(self.delta),
            "backbone": self.backbone.to_json(),
            "seed": self.seed,
            "notes": dict(self.notes),
            "fixed": sorted(self.fixed),
        }

    def write(self, folder: Path | str) -> None:
        """Write `delta.safetensors` and `delta.json` into `folder`, each in one step; the old ones stay if the disk refuses."""
        for name, tensor in self.held.items():
            if not torch.isfinite(tensor).all():
                raise DeltaTuneError(f"the tensor {name!r} holds NaN or infinity; nothing was written to {folder}.")
        tensors = {n: t.detach().to("cpu").contiguous() for n, t in self.held.items()}
        write_bytes(Path(folder) / "delta.safetensors", to_bytes(tensors, {"deltatune": json.dumps(self.spec())}))
        write_json(Path(folder) / "delta.json", self.spec())

    @staticmethod
    def read(path: Path | str) -> Weights:
        """Read weights from a folder or file; raises `DeltaTuneError` for pickles and for foreign, truncated or malformed files."""
        path = _weights_file(Path(path))
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get("deltatune")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            begin = path.read_bytes()[
                :9
            ]  # a safetensors file begins with the length of its header, then the header's brace
            if begin[:2] in PICKLED and begin[8:] != b"{":
                raise _pickled(path) from None
            raise DeltaTuneError(
                f"{path} is not a whole safetensors file ({error}); it may be truncated: copy or save it again."
            ) from None
        if header is None:
            some = ", ".join(sorted(tensors)[:3])
            raise DeltaTuneError(
                f"{path} is a safetensors file, but deltatune did not write it (tensors: {some} ...); it has no delta spec."
            )
        try:
            return _from_header(json.loads(header), tensors)
        except json.JSONDecodeError as error:
            raise DeltaTuneError(f"the spec in the header of {path} is not JSON: {error}.") from None
        except DeltaTuneError as error:
            raise DeltaTuneError(f"cannot read the spec in the header of {path}: {error}") from None


def _weights_file(path: Path) -> Path:
    if path.suffix in PICKLES:
        raise _pickled(path)
    file = path / "delta.safetensors" if path.is_dir() else path
    if not file.is_file():
        found = sorted(p.name for p in path.iterdir())[:5] if path.is_dir() else []
        there = f"; {path} holds {', '.join(found) or 'nothing'}" if path.is_dir() else ""
        raise DeltaTuneError(f"there is no file {file}{there}. Give the folder that deltatune saved to.")
    return file


def _pickled(path: Path) -> DeltaTuneError:
    return DeltaTuneError(
        f"{path} is a pickle, which can run any code when it is opened; deltatune reads safetensors only."
    )


def _from_header(spec: Any, tensors: dict[str, Tensor]) -> Weights:
    if not isinstance(spec, dict):
        raise DeltaTuneError(f"a spec is a JSON object; found {spec!r}.")
    if spec.get("format") != FORMAT:
        raise DeltaTuneError(f"its format is {spec.get('format')!r}; this version of deltatune reads {FORMAT!r}.")
    kinds = {
        "delta": (list, "a list"),
        "backbone": (dict, "an object"),
        "seed": (int, "a whole number"),
        "notes": (dict, "an object"),
    }
    for name, (kind, words) in kinds.items():
        if not isinstance(spec.get(name), kind):
            raise DeltaTuneError(f"{name!r} is missing or is not {words}; found {spec.get(name)!r}.")
    fixed = {name: tensors.pop(name) for name in spec.get("fixed", []) if name in tensors}
    backbone = Fingerprint.from_json(spec["backbone"])
    return Weights(parse(spec["delta"]), tensors, backbone, spec["seed"], spec["notes"], fixed)


def init(delta: Delta | Method, model: nn.Module, seed: int = 0, evidence: Mapping[str, Any] | None = None) -> Weights:
    """Return fresh weights of `delta` for `model`: float32 CPU tensors that depend on (seed, site, leaf) alone.

    `evidence` supplies what an initialiser declares in `needs` (a tokenizer, say); raises `DeltaTuneError` when it lacks.
    """
    delta = as_delta(delta)
    return start(delta, model, place(model, delta), seed, evidence)


def start(
    delta: Delta, model: nn.Module, placements: list[Placement], seed: int, evidence: Mapping[str, Any] | None = None
) -> Weights:
    """Return fresh weights of a delta whose placements are known."""
    held = _starts(model, placements, seed, ("trained", "stored"), evidence or {})
    return Weights(delta, held["trained"], fingerprint(model), seed, fixed=held["stored"])


def generate(
    model: nn.Module,
    placements: list[Placement],
    seed: int,
    kind: Held,
    evidence: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Return the start of all leaves that are held in one way."""
    return _starts(model, placements, seed, (kind,), evidence)[kind]


def _starts(
    model: nn.Module, placements: list[Placement], seed: int, kinds: tuple[Held, ...], evidence: Mapping[str, Any]
) -> dict[Held, dict[str, Tensor]]:
    """Return the start of all leaves that are held in one of some ways, site by site."""
    found: dict[Held, dict[str, Tensor]] = {kind: {} for kind in kinds}
    used: Counter[tuple[Held, str]] = Counter()
    generator = Generator()
    for placement in placements:
        wanted: dict[str, Held] = {leaf: d.kind for leaf, d in placement.leaves.items() if d.kind in kinds}
        if not wanted:
            continue
        given = Given(placement.site, Values(submodule(model, placement.site.path)), evidence)
        for leaf, kind in wanted.items():
            name = placement.name(leaf)
            if name not in found[kind]:
                identity = name.partition(".")[2]
                found[kind][name] = _start(
                    placement, leaf, generator.manual_seed(_number(f"{seed}|{identity}|{used[kind, identity]}")), given
                )
                used[kind, identity] += 1
    return found


def completed(model: nn.Module, weights: Weights, placements: list[Placement]) -> dict[str, Tensor]:
    """Return the tensor of every leaf by its name: what the weights hold, and what their seed regenerates."""
    return {**generate(model, placements, weights.seed, "seeded", {}), **weights.held}


def _number(identity: str) -> int:
    """Return the seed of a leaf."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:7], "big")


def _start(placement: Placement, leaf: str, generator: Generator, given: Given) -> Tensor:
    declared = placement.leaves[leaf]
    lacking = declared.init.needs - set(given.evidence)
    if lacking:
        raise DeltaTuneError(
            f"{placement.method} starts from {sorted(lacking)}: pass init(..., evidence={{{sorted(lacking)[0]!r}: ...}})."
        )
    tensor = declared.init.fill(declared.shape, generator, given)
    if tuple(tensor.shape) != declared.shape:
        raise DeltaTuneError(
            f"{declared.init} gave the shape {tuple(tensor.shape)} for {leaf!r} of {placement.method}; it needs {declared.shape}."
        )
    return tensor.clone(memory_format=torch.contiguous_format)  # a leaf shares memory with nothing
