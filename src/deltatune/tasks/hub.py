"""Tasks of the Hugging Face hub: a mapping says how the columns of a data set become the project's records."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from deltatune.errors import DeltaTuneError, nearest
from deltatune.tasks.example import SPLITS, Example, Kind, Split, list_options, parse_record

# Files that a data set folder may hold; anything else could need code to be run to be read.
DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".arrow", ".gz")
TEXT_SUFFIXES = ("", ".md", ".txt", ".gitattributes", ".yaml", ".lock")
CARVED = 1000
_COLUMN = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Columns:
    """How rows become records.

    `path`, `config` and `revision` name the data set. `input` is a text with `{column}` placeholders; a dot enters a
    structure (`{answers.text}`). `target` is a column: a label's number or name, a letter or position of an option, or
    a text; `values` translates what stands in it (keys are the JSON texts `true`, `1`, ...). `options` is the columns
    of the options, or one column that lists them. `references` is a column that lists the accepted answers.
    `splits` maps train, dev and test to the data set's own; where it has no dev, dev is taken from train, which loses
    it: the tenth, at most 1000, whose row numbers hash lowest. Splits without labels cannot be mapped. `incomplete`
    says whether a row without a label or a text is refused or dropped.
    """

    path: str
    input: str
    target: str
    splits: dict[str, str]
    config: str | None = None
    revision: str | None = None
    values: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    references: str | None = None
    incomplete: Literal["refuse", "drop"] = "refuse"

    @staticmethod
    def from_json(data: Any, where: str) -> Columns:
        """Build a mapping from JSON data; raises `DeltaTuneError` that opens with `where` on keys that do not fit."""
        known = [known.name for known in fields(Columns)]
        if not isinstance(data, dict):
            raise DeltaTuneError(f"{where}: 'hub' is {data!r}; expected an object with {', '.join(known)}.")
        for key in data:
            if key not in known:
                raise DeltaTuneError(f"{where}: unknown key {key!r} in 'hub'.{nearest(key, known)}")
        for key in ("path", "input", "target", "splits"):
            if key not in data:
                raise DeltaTuneError(f"{where}: 'hub' needs {key!r}.")
        splits = data["splits"]
        if not isinstance(splits, dict) or not {"train", "test"} <= set(splits) <= set(SPLITS):
            raise DeltaTuneError(f"{where}: 'splits' is {splits!r}; expected train, test and perhaps dev.")
        return Columns(**{**data, "options": tuple(data.get("options", ()))})


@dataclass(frozen=True)
class HubSource:
    """The examples of a data set read through `datasets`, from the hub or from a folder with the data set's files."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    mapping: Columns

    @property
    def digest(self) -> str:
        """Identity of the mapping and, where the data set is a folder, of its files (sha256).

        What a hub name refers to can change on the hub; a `revision` in the mapping pins it.
        """
        digest = hashlib.sha256(json.dumps([self.name, self.labels, asdict(self.mapping)]).encode())
        folder = Path(self.mapping.path)
        for file in _data_files(folder) if folder.is_dir() else []:
            digest.update(file.relative_to(folder).as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def at(self, path: str) -> HubSource:
        """Return the same task read from another place with the same columns: a folder or a hub name."""
        folder = Path(path).expanduser()
        if not folder.is_dir() and (folder.is_absolute() or path.startswith(".")):
            raise DeltaTuneError(f"there is no folder {path!r} to read {self.name!r} from.")
        if not folder.is_dir():
            return replace(self, mapping=replace(self.mapping, path=path))
        return replace(self, mapping=replace(self.mapping, path=str(folder), config=None, revision=None))

    def read(self, split: Split) -> list[Example]:
        """Read one split and turn its rows into checked examples; raises `DeltaTuneError` when a row does not fit."""
        splits = self.mapping.splits
        carve = "dev" not in splits and split != "test"
        origin = splits["train"] if carve else splits[split]
        rows = self._rows(origin)
        kept = _carve(self.name, len(rows), split) if carve else range(len(rows))
        return list(self._examples(rows, kept, origin, split))

    def _rows(self, origin: str) -> Sequence[dict[str, Any]]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DeltaTuneError(f"task {self.name!r} needs `datasets`: pip install 'deltatune[hub]'.") from error
        mapping = self.mapping
        if Path(mapping.path).is_dir():
            _refuse_code(Path(mapping.path))
        try:
            rows: Any = load_dataset(mapping.path, mapping.config, split=origin, revision=mapping.revision)
        except Exception as error:
            # `datasets` raises its own, pyarrow's, requests' and plain ValueErrors, all meaning the same to the user.
            config = f" ({mapping.config})" if mapping.config else ""
            reason = str(error).partition("\n")[0] or repr(error)
            raise DeltaTuneError(
                f"task {self.name!r}: cannot load split {origin!r} of {mapping.path!r}{config}: {reason} "
                f"Without a network, give a folder with its files: 'hub:{self.name}@<folder>'."
            ) from error
        return rows

    def _examples(
        self, rows: Sequence[dict[str, Any]], kept: Sequence[int], origin: str, split: Split
    ) -> Iterator[Example]:
        for number in kept:
            where = f"{self.mapping.path}, {origin} row {number}"
            record = self._record(rows[number], where)
            if record is not None:
                record |= {"id": f"{self.name}/{split}/{number}", "split": split}
                yield parse_record(record, self.kind, self.labels, where)

    def _record(self, row: dict[str, Any], where: str) -> dict[str, Any] | None:
        mapping = self.mapping
        options = self._options(row, where)
        values = [_text(_column(row, name, where)) for name in _COLUMN.findall(mapping.input)]
        references = _column(row, mapping.references, where) if mapping.references else []
        target = self._target(_column(row, mapping.target, where), options, where)
        if target is None or not all(value.strip() for value in values):
            if mapping.incomplete == "drop":
                return None
            raise DeltaTuneError(f"{where}: the row has no label or an empty text; such splits or rows cannot be used.")
        filled = iter(values)
        text = _COLUMN.sub(lambda match: next(filled), mapping.input)
        record: dict[str, Any] = {"input": text, "target": target, "references": list(references) or [target]}
        if options:
            record["input"] = (text + "\n" + list_options(tuple(options))).strip()
            record["options"] = options
        return record

    def _options(self, row: dict[str, Any], where: str) -> list[str]:
        found = [_column(row, name, where) for name in self.mapping.options]
        if len(found) == 1 and isinstance(found[0], list):
            return [_text(option) for option in found[0]]
        return [_text(option) for option in found]

    def _target(self, value: Any, options: list[str], where: str) -> str | None:
        """Return the target, None where the row has no label (hub data sets write it as -1, null or nothing)."""
        value = value[0] if isinstance(value, list) and value else value
        key = _text(value)
        if key in self.mapping.values:
            return self.mapping.values[key]
        if value in (None, "", -1, []):
            return None
        names = list(ascii_uppercase[: len(options)]) if options else list(self.labels)
        if isinstance(value, int) and not isinstance(value, bool) and names:
            if not 0 <= value < len(names):
                raise DeltaTuneError(f"{where}: label {value} is outside the {len(names)} labels {names[:12]}.")
            return names[value]
        return key


def _carve(name: str, count: int, split: str) -> Sequence[int]:
    ranked = sorted(range(count), key=lambda row: hashlib.sha256(f"{name}/{row}".encode()).digest())
    size = min(CARVED, count // 10)
    return sorted(ranked[:size] if split == "dev" else ranked[size:])


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            known = list(value) if isinstance(value, dict) else []
            raise DeltaTuneError(f"{where}: no column {name!r}; found {', '.join(known)}.{nearest(part, known)}")
        value = value[part]
    return value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value)


def _data_files(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return sorted(file for file in files if file.suffix in DATA_SUFFIXES)


def _refuse_code(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and not file.name.startswith(".") and file.suffix not in DATA_SUFFIXES + TEXT_SUFFIXES:
            raise DeltaTuneError(
                f"{file} is not a data file that is safe to read; a data set folder may hold "
                f"{', '.join(DATA_SUFFIXES)} files. Pickles and scripts are never opened."
            )
