"""One promise of all readers: whatever a file holds, it is read, or a `DeltaTuneError` says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltatune.errors import DeltaTuneError


@contextmanager
def reading(library: str, path: Path | str) -> Iterator[None]:
    """Turn whatever a library's file makes a reader raise, such as a shape that nothing writes, into a `DeltaTuneError`."""
    try:
        yield
    except DeltaTuneError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise DeltaTuneError(
            f"{path} is not as {library} writes its files, or not for this model ({type(error).__name__}: {why})."
        ) from error
