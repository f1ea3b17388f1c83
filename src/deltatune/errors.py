"""Errors that say what was written, what was found and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeltaTuneError(ValueError):
    """A mistake in what the user asked for, or in a file; the message names the cure."""


def nearest(word: str, options: Iterable[str]) -> str:
    """Return a sentence that offers the options most like `word`, or an empty string when none is close."""
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=3, cutoff=0.5)
    if not close:
        return ""
    return " Did you mean " + ", ".join(repr(by_lower[name]) for name in close) + "?"
