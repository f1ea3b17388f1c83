"""Folders of tasks: the index `tasks.json`, or the bare files; each entry becomes a task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deltatune.errors import DeltaTuneError, nearest
from deltatune.files import read_json
from deltatune.tasks.example import Example, Kind, Split, parse_record, read_records
from deltatune.tasks.hub import Columns, HubSource
from deltatune.tasks.metrics import METRICS
from deltatune.tasks.task import Task
from deltatune.tasks.template import Template

INDEX = "tasks.json"
SUFFIXES = (".jsonl.gz", ".jsonl")
KINDS: tuple[Kind, ...] = ("classification", "generation")


@dataclass(frozen=True)
class FileSource:
    """The examples of one `.jsonl` or `.jsonl.gz` file, in which every record names its split."""

    path: Path
    kind: Kind
    labels: tuple[str, ...]
    digest: str

    def read(self, split: Split) -> list[Example]:
        """Read one split; records of the others are looked at for their id and split only."""
        data = _bytes(self.path)
        if _sha256(data) != self.digest:
            raise DeltaTuneError(
                f"{self.path} is not the file it was (sha256 {self.digest[:12]}...); load the task again."
            )
        return [
            parse_record(record, self.kind, self.labels, where)
            for where, record in read_records(self.path, data)
            if record["split"] == split
        ]


def entries(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Return the index of a folder by name, or the bare task files found in it; raises `DeltaTuneError` on neither."""
    index = index_path(folder)
    if index is None:
        return {_stem(path): {"name": _stem(path), "path": path} for path in sorted(folder.iterdir()) if _stem(path)}
    content = read_json(index)
    listed = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise DeltaTuneError(f"{index}: expected an object with 'tasks', a list; found {type(content).__name__}.")
    named: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(listed, start=1):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise DeltaTuneError(f"{index}, entry {number}: 'name' is missing; every task needs one.")
        if name in named:
            raise DeltaTuneError(f"{index}, entry {number}: a task named {name!r} is already listed; names are unique.")
        named[name] = entry
    return named


def index_path(folder: Path) -> Path | None:
    """Return the index of a folder: its own, or its parent's when the folder is the `tasks` beside one."""
    for candidate in (folder / INDEX, folder.parent / INDEX):
        if candidate.is_file() and (candidate.parent == folder or folder.name == "tasks"):
            return candidate
    return None


def build(entry: Mapping[str, Any], folder: Path) -> Task:
    """Build the task of an entry; raises `DeltaTuneError` that names the index and the key that is wrong."""
    if isinstance(entry.get("path"), Path):
        return _infer(entry["name"], entry["path"])
    name = entry["name"]
    where = f"{index_path(folder) or folder}, task {name!r}"
    kind = cast(Kind, _one_of(entry, "kind", KINDS, where))
    metric = _one_of(entry, "metric", tuple(METRICS), where)
    labels = _labels(entry, kind, where)
    try:
        template = Template.from_json(entry.get("template", {}))
    except DeltaTuneError as error:
        raise DeltaTuneError(f"{where}: {error}") from error
    if "hub" in entry:
        source: FileSource | HubSource = HubSource(name, kind, labels, Columns.from_json(entry["hub"], where))
    else:
        source = _file_source(entry, kind, labels, folder, where)
    texts = {key: str(entry.get(key, "")) for key in ("definition", "category", "licence")}
    version = str(entry.get("version", "1"))
    return Task(
        name, kind, labels, metric, version=version, digest=source.digest, template=template, source=source, **texts
    )


def _file_source(entry: Mapping[str, Any], kind: Kind, labels: tuple[str, ...], folder: Path, where: str) -> FileSource:
    file = str(entry.get("file", f"{entry['name']}.jsonl.gz"))
    root = (index_path(folder) or folder / INDEX).parent
    for path in (root / "tasks" / file, root / file):
        if path.is_file():
            digest = _sha256(_bytes(path))
            expected = entry.get("sha256", digest)
            if digest != expected:
                raise DeltaTuneError(
                    f"{path}: sha256 is {digest[:12]}..., the index says {str(expected)[:12]}...; "
                    "the file was changed or is not whole: copy it again, or correct the index."
                )
            return FileSource(path, kind, labels, digest)
    raise DeltaTuneError(f"{where}: there is no file {file!r} in {root} nor in {root / 'tasks'}.")


def _infer(name: str, path: Path) -> Task:
    """Build the task of a file that no index describes.

    It is multiple choice when its records have options; classification when a target occurs ten times on average in
    train; else generation. Test records take no part in the decision.
    """
    data = _bytes(path)
    records = [record for _, record in read_records(path, data) if record["split"] != "test"]
    letters = sorted({letter for record in records for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: _width(record)]})
    targets = [record["target"] for record in records]
    distinct = sorted(set(targets))
    classified = bool(letters) or 10 * len(distinct) <= len(targets)
    kind: Kind = "classification" if classified else "generation"
    labels = tuple(letters or distinct) if classified else ()
    source = FileSource(path, kind, labels, _sha256(data))
    metric = "accuracy" if classified else "rougeL"
    return Task(name, kind, labels, metric, "", "", "", "1", source.digest, Template(), source)


def _width(record: Mapping[str, Any]) -> int:
    options = record.get("options", [])
    return len(options) if isinstance(options, list) else 0


def _one_of(entry: Mapping[str, Any], key: str, options: tuple[str, ...], where: str) -> str:
    value = entry.get(key)
    if value not in options:
        found = f"{value!r} is unknown" if key in entry else "is missing"
        offer = nearest(str(value), options) if key in entry else ""
        raise DeltaTuneError(f"{where}: {key!r} {found}; expected one of {', '.join(options)}.{offer}")
    return str(value)


def _labels(entry: Mapping[str, Any], kind: str, where: str) -> tuple[str, ...]:
    labels = entry.get("labels") or []
    if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise DeltaTuneError(f"{where}: 'labels' is {labels!r}; expected a list of texts that are not empty.")
    if len(set(labels)) != len(labels):
        raise DeltaTuneError(f"{where}: 'labels' holds a label twice: {labels!r}.")
    if kind == "classification" and len(labels) < 2:
        raise DeltaTuneError(f"{where}: a classification task needs 'labels', two or more; found {labels!r}.")
    if kind == "generation" and labels:
        raise DeltaTuneError(f"{where}: a generation task has no 'labels'; found {labels[:3]!r}.")
    return tuple(labels)


def _stem(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.endswith(suffix) and path.is_file():
            return path.name.removesuffix(suffix)
    return ""


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DeltaTuneError(f"cannot read {path}: {error.strerror or error}.") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
