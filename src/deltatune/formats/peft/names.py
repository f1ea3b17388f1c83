"""Names of modules: as wheres of deltatune, and as the targets and patterns of peft's configs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import nn

from deltatune.errors import DeltaTuneError
from deltatune.formats.peft.config import Config


def targets(model: nn.Module, wanted: set[str], loose: bool = False) -> list[str] | str:
    """Return what finds exactly the modules `wanted` as peft's `target_modules`: ends of names, or a regular expression.

    peft takes a module whose name is an end or has it behind a dot; or, where it matches loosely, one that just ends so.
    """
    paths = [name for name, _ in model.named_modules(remove_duplicate=False) if name and name.split(".")[0] != "deltas"]
    for depth in range(1, 1 + max(path.count(".") + 1 for path in wanted)):
        ends = sorted({".".join(path.split(".")[-depth:]) for path in wanted})
        found = {p for p in paths if any(p.endswith(end) if loose else f".{p}".endswith(f".{end}") for end in ends)}
        if found == wanted:
            return ends
    return "|".join(re.escape(path) for path in sorted(wanted))


def aimed(model: nn.Module, config: Config) -> list[str]:
    """Return the paths of the modules that a config's targets find, in the order of the model."""
    if config.get("layers_to_transform") is not None:
        raise DeltaTuneError(
            f"{config.source} says layers_to_transform={config.get('layers_to_transform')!r}, and the file beside it names no "
            "modules; save it with what peft would draw again (save_indices=True)."
        )
    saved = [rf"(.*\.)?{name}(\..*)?" for name in config.get("modules_to_save", [])]
    left_out = [config.get("exclude_modules", []), *saved]
    paths = [path for path, _ in model.named_modules() if path and path.split(".")[0] != "deltas"]
    return [
        path
        for path in paths
        if _finds(config.get("target_modules", []), path) and not any(_finds(names, path) for names in left_out)
    ]


def _finds(names: list[str] | str, path: str) -> bool:
    """Whether peft's targets, a regular expression or ends of names, find a module."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in names)


def patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the most common of the values by path, and those that differ from it as peft's patterns."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{re.escape(path)}": value for path, value in values.items() if value != usual}


def plain(value: float) -> float | int:
    """Return a whole number as one, as peft's configs have it."""
    return int(value) if value == int(value) else value
