"""One example of a task, and the reading and checking of its record."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NoReturn

from deltatune.errors import DeltaTuneError, nearest

Split = Literal["train", "dev", "test"]
Kind = Literal["classification", "generation"]

SPLITS: tuple[Split, ...] = ("train", "dev", "test")
REQUIRED = ("id", "split", "input", "target")
OPTIONAL = ("references", "options")
# First bytes of pickle protocol 2 and later, and of zip archives (numpy and torch files).
BINARY = (b"\x80", b"PK\x03\x04")


@dataclass(frozen=True)
class Example:
    """A text and its answer; `options` is empty unless the example is multiple choice, whose target is a letter."""

    id: str
    input: str
    target: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the options, `A` first."""
        return tuple(ascii_uppercase[: len(self.options)])

    @property
    def question(self) -> str:
        """The input without the options that close it, one `(A) text` a line; the whole input when it lists none."""
        listing = list_options(self.options)
        if listing and self.input.endswith(listing):
            return self.input.removesuffix(listing).rstrip()
        return self.input


def list_options(options: tuple[str, ...]) -> str:
    """Return the options one a line as `(A) text`, the way the input of a multiple choice example ends."""
    return "\n".join(f"({letter}) {text}" for letter, text in zip(ascii_uppercase, options, strict=False))


def parse_record(record: Any, kind: str, labels: tuple[str, ...], where: str) -> Example:
    """Turn a record into an example; raises `DeltaTuneError` that opens with `where` and says what is wrong."""
    fields = check_fields(record, where)
    options = _texts(fields.get("options", []), "options", where)
    references = _texts(fields.get("references", [fields["target"]]), "references", where)
    if not references:
        raise DeltaTuneError(f"{where}: 'references' is empty; leave it out, or list at least the target.")
    example = Example(fields["id"], fields["input"], fields["target"], references, options)
    if options:
        _check_options(example, kind, where)
    if kind == "classification" and example.target not in labels:
        known = ", ".join(repr(label) for label in labels[:12]) + (", ..." if len(labels) > 12 else "")
        offer = nearest(example.target, labels)
        raise DeltaTuneError(f"{where}: target {example.target!r} is not a label of the task ({known}).{offer}")
    return example


def check_fields(record: Any, where: str) -> Mapping[str, Any]:
    """Return the record when its fields are the known ones, texts are texts and the split exists; else raise."""
    if not isinstance(record, dict):
        raise DeltaTuneError(f"{where}: found {_named(record)}; expected an object with {', '.join(REQUIRED)}.")
    for field in record:
        if field not in REQUIRED + OPTIONAL:
            offer = nearest(field, REQUIRED + OPTIONAL)
            raise DeltaTuneError(
                f"{where}: unknown field {field!r}; known are {', '.join(REQUIRED + OPTIONAL)}.{offer}"
            )
    for field in REQUIRED:
        if field not in record:
            raise DeltaTuneError(f"{where}: field {field!r} is missing; a record needs {', '.join(REQUIRED)}.")
        if not isinstance(record[field], str) or not record[field].strip():
            raise DeltaTuneError(f"{where}: {field!r} is {_named(record[field])}; expected a text that is not empty.")
    if record["split"] not in SPLITS:
        offer = nearest(record["split"], SPLITS)
        raise DeltaTuneError(f"{where}: unknown split {record['split']!r}; expected train, dev or test.{offer}")
    return record


def read_records(path: Path, data: bytes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file and line, record) of a `.jsonl` or `.jsonl.gz` file; ids are checked to be unique in the file."""
    seen: dict[str, int] = {}
    for number, line in enumerate(_decode(path, data).split("\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        record = check_fields(_parse_line(line, where), where)
        first = seen.setdefault(record["id"], number)
        if first != number:
            raise DeltaTuneError(f"{where}: id {record['id']!r} was already used in line {first}; ids must be unique.")
        yield where, record


def _decode(path: Path, data: bytes) -> str:
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DeltaTuneError(f"{path} is not a whole gzip file ({error}); write or copy it again.") from error
    if data.startswith(BINARY):
        raise DeltaTuneError(
            f"{path} is a pickled or binary file; tasks are read from JSON lines only and nothing is ever unpickled."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DeltaTuneError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8."
        ) from error


def _parse_line(line: str, where: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise DeltaTuneError(f"{where}: {constant} is not JSON; write a text instead.")

    try:
        return json.loads(line, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise DeltaTuneError(f"{where}: not JSON ({error.msg} at column {error.colno}): {line[:60]!r}.") from error


def _texts(value: Any, field: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise DeltaTuneError(f"{where}: {field!r} is {_named(value)}; expected a list of texts.")
    for item in value:
        if not isinstance(item, str) or not item.strip():
            raise DeltaTuneError(f"{where}: {field!r} holds {_named(item)}; expected texts that are not empty.")
    return tuple(value)


def _check_options(example: Example, kind: str, where: str) -> None:
    if kind != "classification":
        raise DeltaTuneError(f"{where}: 'options' found in a {kind} task; multiple choice is kind 'classification'.")
    if not 2 <= len(example.options) <= len(ascii_uppercase):
        raise DeltaTuneError(f"{where}: {len(example.options)} options; expected 2 to {len(ascii_uppercase)}.")
    if example.target not in example.letters:
        raise DeltaTuneError(
            f"{where}: target {example.target!r} is not a letter of the {len(example.options)} options; "
            f"expected one of {', '.join(example.letters)}."
        )


def _named(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
