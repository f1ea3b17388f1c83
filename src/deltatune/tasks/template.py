"""Templates turn an example into the text a backbone reads and the text it should answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from deltatune.errors import DeltaTuneError, nearest
from deltatune.tasks.example import Example

Choice = Literal["letter", "text"]

SLOT = "{mask}"
DEFAULT_TEXT = "{input}\nanswer:"
PLACEHOLDERS = ("input", "question", "definition", "mask")
KEYS = ("text", "words", "choice")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Prompt:
    """What a backbone reads and what it should answer.

    `target` has no leading space: a causal backbone reads `text + " " + target`. `slot` is the index in `text` of the
    literal `{mask}` that a masked backbone fills with the answer, None where the template has no slot.
    """

    text: str
    target: str
    slot: int | None = None


@dataclass(frozen=True)
class Template:
    """How examples become prompts: a text with placeholders, the word of each label, and how options are answered.

    `text` holds `{input}`, or `{question}` (the input without its listed options), and may hold `{definition}` (the
    task's instruction) and one `{mask}`. `words` gives the text that stands for a label; a label without one stands
    for itself. `choice` says whether a multiple choice example is answered by its letter or by the option's text; the
    prediction is a letter either way.
    """

    text: str = DEFAULT_TEXT
    words: Mapping[str, str] = field(default_factory=dict, hash=False)
    choice: Choice = "letter"

    def __post_init__(self) -> None:
        found = _PLACEHOLDER.findall(self.text)
        for name in found:
            if name not in PLACEHOLDERS:
                known = ", ".join("{" + known + "}" for known in PLACEHOLDERS)
                raise DeltaTuneError(
                    f"template {self.text!r}: unknown placeholder {{{name}}}; known are {known}."
                    f"{nearest(name, PLACEHOLDERS)}"
                )
        if found.count("input") + found.count("question") == 0:
            raise DeltaTuneError(f"template {self.text!r} shows no example; write {{input}} or {{question}} in it.")
        if found.count("mask") > 1:
            raise DeltaTuneError(f"template {self.text!r} has {found.count('mask')} {{mask}} slots; write one.")
        if self.choice not in ("letter", "text"):
            raise DeltaTuneError(f"template choice {self.choice!r} is unknown; write 'letter' or 'text'.")

    def render(self, example: Example, definition: str = "") -> Prompt:
        """Return the prompt of an example; what the example's own texts hold in braces is left alone."""
        values = {"input": example.input, "question": example.question, "definition": definition}
        parts: list[str] = []
        slot: int | None = None
        for position, part in enumerate(_PLACEHOLDER.split(self.text)):
            # re.split alternates literal text and placeholder names.
            if position % 2 and part == "mask":
                slot = len("".join(parts).lstrip())
                parts.append(SLOT)
            else:
                parts.append(values[part] if position % 2 else part)
        return Prompt("".join(parts).strip(), self.verbalize(example.target, example), slot)

    def verbalize(self, label: str, example: Example | None = None) -> str:
        """Return the text that stands for a label, or for a letter of a multiple choice example."""
        if self.choice == "text" and example is not None and label in example.letters:
            return example.options[example.letters.index(label)]
        return self.words.get(label, label)

    def fit(self, kind: Literal["causal", "seq2seq", "masked"]) -> Template:
        """Return this template for a kind of backbone: with a slot when masked, else the text before the slot.

        Raises `DeltaTuneError` when the text before the slot does not show the example.
        """
        if kind == "masked":
            return self if SLOT in self.text else replace(self, text=self.text + " " + SLOT)
        before = self.text.partition(SLOT)[0].rstrip()
        if "{input}" not in before and "{question}" not in before:
            raise DeltaTuneError(
                f"template {self.text!r} asks for the answer before it shows the example, which a {kind} backbone "
                "cannot do; put {mask} after {input}."
            )
        return replace(self, text=before)

    def to_json(self) -> dict[str, Any]:
        """Return the template as JSON data."""
        return {"text": self.text, "words": dict(self.words), "choice": self.choice}

    @staticmethod
    def from_json(data: Any) -> Template:
        """Build a template from JSON data, keys left out taking their defaults; raises `DeltaTuneError` on others."""
        if not isinstance(data, dict):
            raise DeltaTuneError(f"a template is an object with {', '.join(KEYS)}; found {data!r}.")
        for key in data:
            if key not in KEYS:
                raise DeltaTuneError(f"unknown template key {key!r}; known are {', '.join(KEYS)}.{nearest(key, KEYS)}")
        words = data.get("words", {})
        if not isinstance(words, dict) or not all(isinstance(word, str) and word for word in words.values()):
            raise DeltaTuneError(f"template 'words' is {words!r}; expected an object from label to text.")
        if not isinstance(data.get("text", ""), str):
            raise DeltaTuneError(f"template 'text' is {data['text']!r}; expected a text such as {DEFAULT_TEXT!r}.")
        return Template(data.get("text", DEFAULT_TEXT), words, cast(Choice, data.get("choice", "letter")))
