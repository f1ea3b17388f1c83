"""Find a task by its name: built-in, in the data folder, in any folder, or on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from deltatune.errors import DeltaTuneError, nearest
from deltatune.files import read_json
from deltatune.tasks.hub import HubSource
from deltatune.tasks.index import SUFFIXES, build, entries
from deltatune.tasks.task import Task

HERE = Path(__file__).parent
BUILTIN = HERE / "builtin"
HUB = "hub:"


def task(name: str) -> Task:
    """Return a task by name; its examples are read when asked for.

    A name is that of a built-in task; of a task under `$DELTATUNE_DATA`; `<folder>/<task>` or the path of a `.jsonl` or
    `.jsonl.gz` file; or a known hub data set, `glue/sst2`. `hub:glue/sst2` looks on the hub only, and
    `hub:glue/sst2@<place>` reads the same columns from a folder or another hub name. Raises `DeltaTuneError` with the
    nearest names when there is none.
    """
    if name.startswith(HUB):
        return _hub_task(name.removeprefix(HUB))
    for folder in _folders():
        known = entries(folder)
        if name in known:
            return build(known[name], folder)
    found = _by_path(name)
    if found is not None:
        return found
    if name in _hub_entries():
        return _hub_task(name)
    where = "" if _data_folder() else " $DELTATUNE_DATA, the folder of further tasks, is not set."
    raise DeltaTuneError(
        f"there is no task {name!r}: not built in, not in the data folder, not a file, not a known hub name."
        f"{nearest(name, [*task_names(), *hub_names()])}{where}"
    )


def task_names() -> list[str]:
    """Return the names of the built-in tasks and of those under `$DELTATUNE_DATA`."""
    return list(dict.fromkeys(name for folder in _folders() for name in entries(folder)))


def hub_names() -> list[str]:
    """Return the names of the hub data sets whose columns are known."""
    return list(_hub_entries())


def _folders() -> list[Path]:
    data = _data_folder()
    return [BUILTIN] if data is None else [BUILTIN, data]


def _data_folder() -> Path | None:
    written = os.environ.get("DELTATUNE_DATA")
    if not written:
        return None
    folder = Path(written).expanduser()
    if not folder.is_dir():
        raise DeltaTuneError(f"$DELTATUNE_DATA is {written!r}, which is not a folder; point it to one, or unset it.")
    return folder


def _by_path(name: str) -> Task | None:
    path = Path(name).expanduser()
    folder, stem = path.parent, path.name
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    # A bare name is never looked up in the working folder: what it means must not depend on where one stands.
    if "/" not in name or not folder.is_dir():
        return None
    known = entries(folder)
    if stem in known:
        return build(known[stem], folder)
    if path.suffix or path.is_absolute():
        raise DeltaTuneError(f"there is no task {stem!r} in {folder}.{nearest(stem, known)}")
    return None


@cache
def _hub_entries() -> Mapping[str, Mapping[str, Any]]:
    return {entry["name"]: entry for entry in read_json(HERE / "hub.json")["tasks"]}


def _hub_task(name: str) -> Task:
    name, _, place = name.partition("@")
    known = _hub_entries()
    if name not in known:
        raise DeltaTuneError(
            f"the columns of the hub data set {name!r} are not known.{nearest(name, known)} For another one, list it "
            "in a tasks.json with a 'hub' mapping and name it '<folder>/<task>'."
        )
    found = build(known[name], HERE)
    if not place or not isinstance(found.source, HubSource):
        return found
    source = found.source.at(place)
    return replace(found, source=source, digest=source.digest)
