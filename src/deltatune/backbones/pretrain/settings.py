"""The settings of a pre-training run: a TOML file read into frozen dataclasses, every key checked."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from deltatune.errors import DeltaTuneError, nearest


@dataclass(frozen=True)
class TokenizerSettings:
    """Size of the byte-level BPE vocabulary, special tokens included."""

    size: int = 4096


@dataclass(frozen=True)
class ModelSettings:
    """Widths of the network: a Llama for next-token prediction, a T5 (`layers` in each stack) for span corruption."""

    width: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    ffn: int = 512
    context: int = 256
    dropout: float = 0.0


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is predicted; `noise`, `span`, `prefix_share` and `prefix` belong to span corruption only."""

    name: Literal["next-token", "span-corruption"] = "next-token"
    noise: float = 0.15
    span: float = 3.0
    prefix_share: float = 0.0
    prefix: int = 64
    sentinels: int = 32


@dataclass(frozen=True)
class TextSettings:
    """How often one text is read in a pass, and what separates its documents: a blank line or every line end."""

    repeat: float = 1.0
    document: Literal["blank-line", "line"] = "blank-line"


@dataclass(frozen=True)
class TrainSettings:
    """The optimisation: `steps` updates of `batch` rows; the rate warms up linearly and stays at `lr` until the last
    share `decay` of the steps, a cosine down to `final` x `lr` (1: a cosine over all of them).

    `attention` and `compile` change the speed alone: on a CPU, eager attention and compilation gave +70 % at width 192.
    """

    steps: int = 1000
    batch: int = 16
    optimizer: Literal["adamw", "adamw-rms", "muon"] = "adamw"
    lr: float = 3e-3
    warmup: int = 100
    decay: float = 1.0
    final: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    attention: Literal["eager", "sdpa"] = "sdpa"
    compile: bool = False
    log_every: int = 20
    checkpoint_every: int = 200
    validation_every: int = 200
    validation_rows: int = 128
    final_validation_rows: int = 1024
    held_out: float = 0.005


@dataclass(frozen=True)
class Settings:
    """Everything that determines the product, apart from the texts themselves."""

    name: str
    seed: int = 0
    licence: str = ""
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    texts: dict[str, TextSettings] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        """Whether the model is a decoder trained on next tokens."""
        return self.objective.name == "next-token"

    def text(self, name: str) -> TextSettings:
        """How the text called `name` is read."""
        return self.texts.get(name, TextSettings())

    def to_json(self) -> dict[str, Any]:
        """Every value, defaults included, as plain JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def differences(self, other: dict[str, Any]) -> list[str]:
        """The keys, as `train.steps`, whose values differ from those in another run's JSON."""
        mine, theirs = _flat(self.to_json()), _flat(other)
        return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def read_settings(path: Path | str) -> Settings:
    """Read a TOML settings file; raises `DeltaTuneError` naming the line of bad TOML, or the unknown or wrong key."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeltaTuneError(f"there is no settings file {path}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeltaTuneError(f"{path} is not TOML: {error}.") from error
    return parse_settings(content, str(path))


def parse_settings(content: dict[str, Any], source: str = "settings") -> Settings:
    """Build `Settings` from parsed TOML; raises `DeltaTuneError` for unknown keys, wrong types and impossible sizes."""
    settings = _build(Settings, content, source, "")
    _check(settings, source)
    return settings


def _build(kind: type, content: Any, source: str, prefix: str) -> Any:
    if not isinstance(content, dict):
        raise DeltaTuneError(f"{source}: {prefix.rstrip('.')} is {content!r}; write a table, [{prefix.rstrip('.')}].")
    hints = get_type_hints(kind)
    values = {}
    for key, value in content.items():
        if key not in hints:
            raise DeltaTuneError(
                f"{source}: unknown key {prefix}{key}.{nearest(key, hints)} Known here: {', '.join(hints)}."
            )
        values[key] = _convert(hints[key], value, source, prefix + key)
    if kind is Settings and "name" not in values:
        raise DeltaTuneError(f'{source}: there is no name; write for example name = "pebble" on the first line.')
    return kind(**values)


def _convert(hint: Any, value: Any, source: str, key: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, source, key + ".")
    if get_origin(hint) is dict:
        inner = get_args(hint)[1]
        if not isinstance(value, dict):
            raise DeltaTuneError(f"{source}: {key} is {value!r}; write tables such as [{key}.NAME].")
        return {name: _build(inner, content, source, f"{key}.{name}.") for name, content in value.items()}
    if get_origin(hint) is Literal:
        options = get_args(hint)
        if value not in options:
            known = ", ".join(map(repr, options))
            raise DeltaTuneError(f"{source}: {key} is {value!r}.{nearest(str(value), options)} Write one of {known}.")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise DeltaTuneError(
            f"{source}: {key} is {value!r}, a {type(value).__name__}; write a value of type {_word(hint)}."
        )
    return value


def _word(kind: Any) -> str:
    return {int: "int", float: "float", str: "str", bool: "bool"}[kind]


def _check(settings: Settings, source: str) -> None:
    model, objective, train = settings.model, settings.objective, settings.train
    smallest = 300 + objective.sentinels
    demands = [
        (model.width % model.heads == 0, "model.width must be a multiple of model.heads"),
        (model.heads % max(1, model.kv_heads) == 0, "model.heads must be a multiple of model.kv_heads"),
        (smallest <= settings.tokenizer.size <= 65536, f"tokenizer.size must be between {smallest} and 65536 (uint16)"),
        (0.0 < objective.noise < 1.0, "objective.noise must be between 0 and 1"),
        (objective.span >= 1.0, "objective.span must be at least 1 token"),
        (0.0 <= objective.prefix_share <= 1.0, "objective.prefix_share must be between 0 and 1"),
        (
            not objective.prefix_share or 0 < objective.prefix < model.context,
            "objective.prefix must be shorter than model.context",
        ),
        (0.0 < train.held_out < 1.0, "train.held_out must be between 0 and 1"),
        (0.0 < train.decay <= 1.0, "train.decay must be a share of the steps, more than 0 and at most 1"),
        (train.warmup < train.steps, "train.warmup must be less than train.steps"),
        (
            min(train.steps, train.batch, train.checkpoint_every, train.validation_every, train.log_every) > 0,
            "the counts in [train] must be positive",
        ),
    ]
    for holds, demand in demands:
        if not holds:
            raise DeltaTuneError(f"{source}: {demand}.")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
