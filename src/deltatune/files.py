"""Atomic writes: a reader sees the old file or the whole new one, never a part; a failed write leaves the old one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltatune.errors import DeltaTuneError


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace the file at `path` by `data` in one step; raises `DeltaTuneError` when the disk refuses it."""
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        kept = "the file that was there is unchanged" if path.exists() else "nothing was written"
        raise DeltaTuneError(f"cannot write {path}: {error.strerror or error}; {kept}.") from error


def write_text(path: Path | str, text: str) -> None:
    """Replace the file at `path` by `text` (UTF-8) in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Replace the file at `path` by `value` as indented JSON; refuses NaN and infinities, which are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `path` at the end; after an error nothing is left of it.

    Raises `DeltaTuneError` when `path` is there already and is not an empty folder, or when the disk refuses it.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise DeltaTuneError(f"{path} is there already; choose another name, or delete it first.")
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
        yield Path(temporary)
        os.chmod(temporary, 0o755)  # mkdtemp makes private folders
        os.replace(temporary, path)
    except OSError as error:
        raise DeltaTuneError(f"cannot write {path}: {error.strerror or error}; nothing was written.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path | str) -> Any:
    """Read a JSON file; raises `DeltaTuneError` with the line and column when it is not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeltaTuneError(f"there is no file {path}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DeltaTuneError(f"{path} is not JSON: {error}.") from error
