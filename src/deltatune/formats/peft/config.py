"""adapter_config.json: its fields with the types they need, and whether all of them are understood."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltatune.errors import DeltaTuneError

# fields of every type that say nothing about the function, or that the tensors' keys say better
COMMON = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "fan_in_fan_out",
        "bias",
        "init_weights",
        "runtime_config",
        "ensure_weight_tying",
        "megatron_config",
        "megatron_core",
    ]
)
NOTHING = (None, False, 0, 0.0, "", [], {})


class Config:
    """The fields of one adapter_config.json."""

    def __init__(self, fields: Mapping[str, Any], source: Path) -> None:
        self.fields, self.source = fields, source

    @property
    def type(self) -> str:
        """The peft type, e.g. LORA."""
        return self.fields["peft_type"]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field; one that is missing or null has its default."""
        value = self.fields.get(name)
        return default if value is None else value

    def number(self, name: str, default: float) -> float:
        """Return a field that is a number."""
        return self._number(name, self.get(name, default))

    def whole(self, name: str, default: int) -> int:
        """Return a field that is a whole number."""
        value = self.number(name, default)
        if value != int(value):
            raise DeltaTuneError(f"{name} in {self.source} is a whole number; found {value!r}.")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a field that is true or false."""
        return bool(self.get(name, default))

    def at(self, pattern: str, path: str, default: float) -> float:
        """Return the number that `rank_pattern` or `alpha_pattern` has for a module: that of the first key that matches its end."""
        patterns = self.get(pattern, {})
        if not isinstance(patterns, dict):
            raise DeltaTuneError(f"{pattern} in {self.source} is an object of numbers; found {patterns!r}.")
        for key, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({key})$", path):
                    return self._number(f"{pattern}[{key!r}]", value)
            except re.error as error:
                raise DeltaTuneError(f"the key {key!r} of {pattern} in {self.source} is no pattern: {error}.") from None
        return default

    def check(self, known: frozenset[str], refused: Mapping[str, str]) -> None:
        """Raise `DeltaTuneError` for a field that changes the function in a way that is not expressed, or is not known."""
        for name, value in self.fields.items():
            if value in NOTHING:
                continue
            if name in refused:
                raise DeltaTuneError(f"{self.source} says {name}={value!r}: {refused[name]}.")
            if name not in known | COMMON:
                raise DeltaTuneError(
                    f"{self.source} says {name}={value!r}, a field of {self.type} that deltatune does not know and that may "
                    "change what the adapter computes; pass check=False to read it without that field."
                )

    def _number(self, name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise DeltaTuneError(f"{name} in {self.source} is a number; found {value!r}.")
        return value
