"""The record of a run: one JSON object a line, cut back to the checkpoint when a run continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltatune.files import write_text

Line = dict[str, Any]


def read_log(path: Path) -> list[Line]:
    """All whole lines of the log; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def cut_back(path: Path, step: int) -> None:
    """Drop what was logged after `step`, for those steps are going to be done again."""
    kept = [line for line in read_log(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def append(path: Path, line: Line) -> None:
    """Add one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
