"""Where a run was made: versions, code state and hardware, with nothing that names a person, a machine or a path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("deltatune", "torch", "transformers", "accelerate")
SOURCE = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Return versions, the commit and dirty flag of the code that runs, processor, cores, threads and GPU."""
    import torch

    commit, dirty = _code_state()
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "git": commit,
        "dirty": dirty,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code_state() -> tuple[str | None, bool | None]:
    # An installed copy may lie inside somebody else's repository, whose commit says nothing about this code.
    if _git("ls-files", "--error-unmatch", "--", __file__) is None:
        return None, None
    changes = _git("status", "--porcelain", "--", str(SOURCE))
    return _git("rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(SOURCE), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
