"""A simple word perturbation: typing errors of a fixed rate, the same for the same text and seed.

A word of four letters or more is hit with probability `rate`; two neighbouring inner letters change places, or one is left
out. First and last letters stay, so a person reads on without trouble.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from deltatune.errors import DeltaTuneError
from deltatune.tasks import Example

LETTERS = 4  # of the shortest word that is hit


def perturbed(text: str, rate: float, seed: int = 0) -> str:
    """Return a text with some of its words mistyped; raises `DeltaTuneError` for a rate outside 0 to 1."""
    if not 0 <= rate <= 1:
        raise DeltaTuneError(f"rate={rate} is no share of the words; write 0 to 1, e.g. 0.3.")
    random = Random(f"{seed}|{text}")
    return re.sub(r"\S+", lambda found: _mistyped(found[0], random) if random.random() < rate else found[0], text)


def attacked(examples: Sequence[Example], rate: float, seed: int = 0) -> list[Example]:
    """Return examples with perturbed inputs; what is asked for stays."""
    return [replace(example, input=perturbed(example.input, rate, seed)) for example in examples]


def _mistyped(word: str, random: Random) -> str:
    if len(word) < LETTERS or not word.isalpha():
        return word
    at = random.randrange(1, len(word) - 2)
    return word[:at] + random.choice([word[at + 1] + word[at], word[at + 1]]) + word[at + 2 :]
