"""From a backbone's name to the folder with its files, and the identity of those files.

A name is a built-in one, one under $DELTATUNE_MODELS, a folder, or a hub name (from the local cache when there is no
network). In front of any of them, `random:` asks for the same architecture and tokenizer with fresh weights.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from deltatune.errors import DeltaTuneError, nearest
from deltatune.files import read_json
from deltatune.hub import fetch

BUILTIN = Path(__file__).parent / "builtin"
RANDOM = "random:"
# what a hub snapshot needs: nothing that could hold a pickle, no second copy of the weights, nothing in subfolders
HUB_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "*.spm", "model.safetensors", "model-*.safetensors"]
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Source:
    """Where a backbone's files are, and whether its weights are drawn anew instead of read."""

    name: str
    folder: Path
    fresh: bool


def names() -> list[str]:
    """Return the names of the built-in backbones and of those under $DELTATUNE_MODELS."""
    found = {path.parent.name for root in _roots() for path in root.glob("*/config.json")}
    return sorted(found)


def find(name: str) -> Source:
    """Return the source of a backbone; raises `DeltaTuneError` with the nearest known names when there is none."""
    plain = name.removeprefix(RANDOM)
    return Source(name, _folder(plain), plain != name)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder; raises `DeltaTuneError` when they are missing or only pickled."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        shards = [folder / name for name in _shards(index)]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise DeltaTuneError(
                f"{folder} lacks {', '.join(missing)}, which {index.name} names; copy the whole folder."
            )
        return shards
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise DeltaTuneError(
            f"{folder} holds its weights only as {pickles[0]}, a pickle, which can run code when it is read; deltatune "
            f"reads safetensors. If you trust its origin, convert it once: load it with transformers and call "
            f"model.save_pretrained(a new folder), which writes model.safetensors."
        )
    raise DeltaTuneError(f"{folder} has no model.safetensors, so it holds no weights that deltatune reads.")


def stored_dtype(name: str) -> str:
    """Return the float type that most tensors of a backbone's files have, as `load` takes it; float32 for any other."""
    from safetensors import safe_open

    counts: Counter[str] = Counter()
    for path in weight_files(find(name).folder):
        with safe_open(path, framework="pt") as file:
            counts.update(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
    most = counts.most_common(1)[0][0] if counts else ""
    return {"BF16": "bfloat16", "F16": "float16"}.get(most, "float32")


def config_dtype(name: str) -> str:
    """Return the float type that a backbone's config names, float32 when it names none that `load` takes."""
    config = read_json(find(name).folder / "config.json")
    named = config.get("dtype", config.get("torch_dtype"))
    return named if named in ("bfloat16", "float16") else "float32"


def _shards(index: Path) -> list[str]:
    content = read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not all(isinstance(name, str) and "/" not in name for name in table.values()):
        raise DeltaTuneError(
            f"{index} has no weight_map from tensors to files of its folder; copy the whole folder again."
        )
    return sorted(set(table.values()))


def digest(name: str) -> str:
    """Return the sha256 (hex) of a backbone's config and weights files; with `random:`, of its config alone."""
    source = find(name)
    files = [source.folder / "config.json", *([] if source.fresh else weight_files(source.folder))]
    lines = [f"{path.name} {_file_digest(path, path.stat().st_size, path.stat().st_mtime_ns)}" for path in files]
    if source.fresh:
        lines.append("fresh weights")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@lru_cache(maxsize=256)
def _file_digest(path: Path, size: int, modified: int) -> str:
    # size and time of change belong to the key: a file that was replaced is read again
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _roots() -> list[Path]:
    given = os.environ.get("DELTATUNE_MODELS")
    return [BUILTIN, *([Path(given).expanduser()] if given else [])]


def _folder(name: str) -> Path:
    bare = name not in ("", ".", "..") and not any(mark in name for mark in "/\\~")
    for root in _roots() if bare else []:
        if (root / name / "config.json").is_file():
            return _checked(root / name)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _checked(path)
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DeltaTuneError(f"there is no backbone folder {name!r}.{_known(name)}")
    return _checked(fetch(name, HUB_FILES, ["*/*"], "backbone", _known(name)))


def _checked(folder: Path) -> Path:
    adapter = (folder / "adapter_config.json").is_file()
    if not (folder / "config.json").is_file():
        hint = " It is an adapter, a delta: attach it to its backbone with deltatune.load." if adapter else ""
        raise DeltaTuneError(f"{folder} has no config.json, so it is not a backbone folder.{hint}")
    if adapter:
        raise DeltaTuneError(
            f"{folder} holds an adapter (adapter_config.json) beside config.json; move it to a folder of its own."
        )
    return folder


def _known(name: str) -> str:
    known = names()
    some = f" Known here: {', '.join(known)}." if known else ""
    return (
        f"{nearest(name, known)}{some} A folder with config.json works too, or a hub name such as 'google-t5/t5-small'."
    )
