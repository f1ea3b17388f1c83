"""What was measured, in one file a device: `cpu.json` or `cuda.json`, {"benchmarks": {name: result}}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltatune.files import read_json, write_json

Results = dict[str, dict[str, Any]]


def keep(path: Path, name: str, result: dict[str, Any]) -> None:
    """Put a result in the place of that benchmark's earlier one."""
    known = read(path) if path.exists() else {}
    write_json(path, {"benchmarks": dict(sorted({**known, name: result}.items()))})


def read(path: Path) -> Results:
    """Return the results in a file by the name of their benchmark."""
    return read_json(path)["benchmarks"]


def files(folder: Path) -> list[Path]:
    """Return the files of results in a folder, one a device."""
    return sorted(folder.glob("*.json"))


def statement(result: dict[str, Any]) -> str:
    """Say how, where and with what a result was measured."""
    at, how = result["machine"], "GPU time" if result["device"] == "cuda" else "CPU time"
    versions = ", ".join(f"{name} {at[name]}" for name in ("deltatune", "torch", "transformers", "peft"))
    commit = (at["git"] or "unknown")[:10] + (" with changes" if at["dirty"] else "")
    where = at["gpu"] if result["device"] == "cuda" else _cpu(at)
    quick = "A trial with tiny shapes, whose times say nothing. " if result["quick"] else ""
    return f"{quick}{how}, {result['rounds']} interleaved rounds, median [quartiles]; {where}; {versions}; commit {commit}."


def _cpu(at: dict[str, Any]) -> str:
    threads = f"{at['threads']} thread{'s' if at['threads'] > 1 else ''} of {at['cores']} cores"
    return f"{at['cpu']}, {threads}, load {at['load']}"
