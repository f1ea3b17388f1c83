"""Weights on the Hugging Face hub: read by `user/name` in any format, and sent with a card that says what they are."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from deltatune.core.attach import Attachment
from deltatune.core.contents import Held, contents
from deltatune.core.store import Format, read
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.files import write_text
from deltatune.formats.opendelta import CONFIG, TENSORS, is_opendelta
from deltatune.hub import fetch, is_name, send

FILES = ("*.safetensors", "*.json", "*.bin", "*.pt", "*.lora", "*.yaml")
NOT = ("*/*", "model*.safetensors", "pytorch_model*.bin")  # a whole model, which nobody wants where a delta is meant
WHAT = "file or folder"

CARD = """---
{data}
---

# {title}

A delta for {backbone}: `{delta}`. It trains {parameters:,} parameters, {size:,} bytes in all; the backbone's own are not in it.

| method | place | sites | trained parameters |
|---|---|---:|---:|
{rows}

Made for a {family} with the fingerprint structure {structure}, values {values}; another backbone is refused.

```python
import deltatune as dt

backbone = dt.load_backbone({load!r})
dt.load(backbone.model, {name!r})
```
"""


def absent(path: Path) -> bool:
    """Whether nothing is at a path that can name a repository."""
    return is_name(path.as_posix()) and not path.exists()


def local(path: Path) -> Path:
    """Return a path that is there as it is, and for the name of a repository the folder with its files."""
    if not absent(path):
        return path
    folder = fetch(path.as_posix(), FILES, NOT, WHAT)
    if is_opendelta(folder):  # whose tensors are called as those of a whole model
        return fetch(path.as_posix(), (CONFIG, TENSORS), NOT[:1], WHAT)
    return folder


def _read(model: nn.Module, path: Path, check: bool) -> Weights:
    return read(model, local(path), check)


HUB = Format("user/name on the Hugging Face hub, of any of these formats", absent, _read)


def push(
    what: Attachment | Weights,
    name: str,
    model: str | None = None,
    license: str | None = None,
    private: bool = False,
    message: str = "Upload a delta",
) -> str:
    """Send weights to the Hugging Face hub as `user/name`, with a card, and return their address.

    `model` is the name of the backbone there. Raises `DeltaTuneError` for other names, and when the hub refuses.
    """
    if not is_name(name):
        raise DeltaTuneError(f"{name!r} is no name of the Hugging Face hub; write user/name.")
    weights = what.weights if isinstance(what, Attachment) else what
    with tempfile.TemporaryDirectory() as folder:
        weights.write(folder)
        write_text(Path(folder) / "README.md", card(weights, name, model, license))
        return send(Path(folder), name, private, message)


def card(weights: Weights, name: str, model: str | None = None, license: str | None = None) -> str:
    """Return the model card of weights: YAML for the hub, what they are, and how to use them."""
    held, own = contents(weights), weights.backbone
    methods = dict.fromkeys(type(term.method).__name__.lower() for term in weights.delta.terms)
    data: dict[str, Any] = {
        "base_model": model if model and is_name(model) else None,
        "library_name": "deltatune",
        "license": license,
    }
    data["tags"] = ["delta-tuning", "parameter-efficient-fine-tuning", *methods]
    return CARD.format(
        data="\n".join(f"{key}: {json.dumps(value)}" for key, value in data.items() if value),  # JSON is YAML
        title=name.partition("/")[2],
        backbone=f"`{model}`" if model else f"a {own.family}",
        delta=weights.delta,
        parameters=weights.count,
        size=weights.nbytes,
        rows="\n".join(map(_row, held)),
        family=own.family,
        structure=own.structure,
        values=own.values or "not known",
        load=model or "the name or folder of that backbone",
        name=name,
    )


def _row(held: Held) -> str:
    sites = sum(address != "*" for address in held.sites)
    parameters = sum(entry.parameters for entry in held.entries if entry.trained)
    where = held.term.where.replace("|", "\\|")
    return f"| `{held.term.method}` | `{where}` | {sites} | {parameters:,} |"
