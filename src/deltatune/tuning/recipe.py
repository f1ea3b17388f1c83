"""How to train (`Recipe`) and what to train (`Run`): two values, serialisable, with a content hash as name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from deltatune.errors import DeltaTuneError, nearest

OPTIMIZERS = ("adamw", "adafactor", "sgd")
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16", "int8")
COMPILERS = ("none", "inductor", "aot_eager")
TERMS = "terms"  # in a record, beside the delta's text

Value = TypeVar("Value", bound="Recipe | Run")


@dataclass(frozen=True)
class Recipe:
    """How a delta is trained; raises `DeltaTuneError` when a field is outside its range.

    Lengths are in tokens, `warmup` is the share of the steps in which the learning rate rises from 0, and 0 switches
    `clip`, `eval_every`, `patience`, `dev_limit`, `test_limit`, `checkpoint_every` and `shots` off. Without `test` the run
    is judged on dev alone and never reads the test split. A `compiler` of torch's changes numbers by rounding.
    """

    steps: int = 300
    batch: int = 16
    lr: float = 1e-3
    optimizer: str = field(default="adamw", metadata={"options": OPTIMIZERS})
    schedule: str = field(default="linear", metadata={"options": SCHEDULES})
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: str = field(default="fp32", metadata={"options": PRECISIONS})
    eval_every: int = 50
    patience: int = 0
    dev_limit: int = 200
    test_limit: int = 0
    max_input: int = 256
    max_target: int = 64
    eval_batch: int = 32
    checkpoint_every: int = 50
    shots: int = 0
    dropout: bool = False
    test: bool = True
    compiler: str = field(default="none", metadata={"options": COMPILERS, "later": True})

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            options = item.metadata.get("options")
            value = getattr(self, item.name)
            if options:
                _check_option(item.name, value, options)
            else:
                object.__setattr__(self, item.name, _number(item.name, value, type(item.default)))
        for name, least in {"steps": 1, "batch": 1, "eval_batch": 1, "max_input": 8, "max_target": 2}.items():
            if getattr(self, name) < least:
                raise DeltaTuneError(f"recipe: {name} is {getattr(self, name)}; write {least} or more.")
        if self.lr <= 0:
            raise DeltaTuneError(f"recipe: lr is {self.lr:g}; a learning rate is above 0, for example 1e-3.")
        if self.warmup > 1:
            raise DeltaTuneError(f"recipe: warmup is {self.warmup:g}; it is a share of the steps, write 0 to 1.")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON and TOML can hold.

        Fields that recipes did not always have are left out at their default, so that runs of before keep their names.
        """
        later = {item.name: item.default for item in dataclasses.fields(self) if "later" in item.metadata}
        own = dataclasses.asdict(self).items()
        return {name: value for name, value in own if name not in later or value != later[name]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from a mapping; fields left out keep their defaults, unknown ones are an error."""
        return cls(**_known(cls, data, "recipe"))


@dataclass(frozen=True)
class Run:
    """One delta trained on one backbone for one task with one recipe and seed; `delta` is kept in canonical text.

    `start` is a folder of weights that stay frozen under it: the delta is the next stage.
    """

    delta: str
    backbone: str
    task: str
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    start: str | None = None

    def __post_init__(self) -> None:
        import deltatune as dt

        object.__setattr__(self, "delta", str(dt.parse(self.delta)))
        object.__setattr__(self, "seed", int(_number("seed", self.seed, int, owner="run")))

    @cached_property
    def id(self) -> str:
        """12 hex digits of the SHA-256 over this run and the contents of its task, its backbone and its start."""
        from deltatune.backbones import digest
        from deltatune.formats.hub import local
        from deltatune.tasks import task

        content = {
            **self.to_json(),
            # The text leaves defaults out; the JSON spells them, so that a later default makes another run.
            "delta": _spelled(self.delta),
            "task_digest": task(self.task).digest,
            "backbone_digest": digest(self.backbone),
            **({"start": _digest(local(Path(self.start)))} if self.start is not None else {}),
        }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values, without a start where there is none."""
        fields = {**vars(self), "recipe": self.recipe.to_json()}
        return {item.name: fields[item.name] for item in dataclasses.fields(self) if fields[item.name] is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Run:
        """Build a run from what `to_json` returned; raises `DeltaTuneError` on missing or unknown fields."""
        values = _known(cls, data, "run")
        missing = [name for name in ("delta", "backbone", "task") if name not in values]
        if missing:
            raise DeltaTuneError(f"run: there is no {missing[0]!r}; a run names a delta, a backbone and a task.")
        return cls(**{**values, "recipe": Recipe.from_json(values.get("recipe", {}))})

    def record(self) -> dict[str, Any]:
        """Return what a folder keeps of the run: its id, its fields, and the terms of its delta with every default spelled."""
        return {"id": self.id, **self.to_json(), TERMS: _spelled(self.delta)}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Run:
        """Build the run from what `record` returned, its delta from the text."""
        return cls.from_json({name: value for name, value in record.items() if name not in ("id", TERMS)})

    def means(self, record: Mapping[str, Any]) -> bool:
        """Whether its delta is the recorded one: the same text meant another when a method had other defaults."""
        spelled = _spelled(self.delta)
        return record.get(TERMS, spelled) == spelled


def _spelled(delta: str) -> Any:
    """Return the JSON of a delta's text, in which no default is left out, as it reads back from a file."""
    import deltatune as dt

    return json.loads(json.dumps(dt.parse(delta).to_json()))


def _digest(weights: Path) -> str:
    """Return the SHA-256 (hex) of a file of weights, or of all files of another library's folder."""
    own = weights / "delta.safetensors" if weights.is_dir() else weights
    files = [own] if own.is_file() else sorted(path for path in weights.glob("*") if path.is_file())
    if not files:
        raise DeltaTuneError(f"there are no weights to start from in {weights}; give a folder that tune wrote.")
    digests = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _known(cls: type[Value], data: Mapping[str, Any], owner: str) -> dict[str, Any]:
    names = [item.name for item in dataclasses.fields(cls)]
    for name in data:
        if name not in names:
            offer = nearest(name, names) or f" A {owner} has {', '.join(names)}."
            raise DeltaTuneError(f"{owner}: there is no field {name!r}.{offer}")
    return dict(data)


def _check_option(name: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        offer = nearest(str(value), options) or f" Write one of {', '.join(options)}."
        raise DeltaTuneError(f"recipe: there is no {name} {value!r}.{offer}")


def _number(name: str, value: Any, kind: type, owner: str = "recipe") -> int | float | bool:
    if kind is bool:
        if not isinstance(value, bool):
            raise DeltaTuneError(f"{owner}: {name} is {value!r}; write true or false.")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DeltaTuneError(f"{owner}: {name} is {value!r}; write a number.")
    if not math.isfinite(value) or value < 0:
        raise DeltaTuneError(f"{owner}: {name} is {value!r}; it cannot be below 0 or infinite.")
    if kind is int and value != int(value):
        raise DeltaTuneError(f"{owner}: {name} is {value!r}; write a whole number.")
    return kind(value)
