"""Writing a backbone: a model with changed values as a folder like the one that it was read from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltatune.backbones.load import Backbone, load, quiet
from deltatune.backbones.source import find
from deltatune.errors import DeltaTuneError
from deltatune.files import read_json, write_json

# what goes along as it is: tokenizer, generation settings, card and licence
BESIDE = ("*.json", "*.txt", "*.jinja", "*.model", "*.spm", "*.md", "LICENSE*")
INDEX = "model.safetensors.index.json"


def write_backbone(backbone: Backbone, folder: Path, dtype: str) -> None:
    """Write a backbone's model into `folder`, with the other files of its source as they are, and read it back.

    Raises `DeltaTuneError` when what is read is not what was written: an architecture without a place for a bias, say.
    """
    model: Any = backbone.model
    with quiet():
        model.save_pretrained(folder)
    source = find(backbone.name).folder
    for path in (path for pattern in BESIDE for path in source.glob(pattern) if path.name != INDEX):
        shutil.copyfile(path, folder / path.name)
    config = {name: value for name, value in read_json(source / "config.json").items() if name != "torch_dtype"}
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = {} if head is None or head.weight is table.weight else {"tie_word_embeddings": False}
    write_json(folder / "config.json", {**config, "dtype": dtype, **tied})
    _check(model, load(str(folder), dtype).model)


def _check(written: nn.Module, read: nn.Module) -> None:
    found = dict(read.named_parameters(remove_duplicate=False))
    for name, parameter in written.named_parameters(remove_duplicate=False):
        if name not in found:
            raise DeltaTuneError(
                f"the files of a {type(written).__name__} have no place for {name!r}, which the delta gives it; keep the "
                "delta attached."
            )
        if not torch.equal(parameter, found[name]):
            raise DeltaTuneError(
                f"{name!r} of this {type(written).__name__} does not come back from its files as it was written (is it "
                "shared with another parameter?); keep the delta attached."
            )
