"""pyreft itself, in another process: it computes what deltatune wrote, and deltatune what it wrote."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import deltatune as dt
from deltatune.formats import read_pyreft, write_pyreft
from tests.formats.live import Kinds, assert_same, exchange, needs_others

pytestmark = needs_others

CAUSAL, ENCODERS = ("llama", "qwen2", "gpt2"), ("roberta",)
KINDS: Kinds = {
    f"{kind}-{positions}": (families, text.format(kind))
    for kind in ("LoReFT", "NoReFT", "DiReFT")
    for positions, (families, text) in {
        "f1": (CAUSAL, "AtPositions({}(rank=2), first=1)"),
        "tied+f1+l1": (ENCODERS, "AtPositions({}(rank=2), first=1, last=1)"),
        "f1+l1": (ENCODERS, "AtPositions({0}(rank=2), last=1) + AtPositions({0}(rank=2), first=1)"),
        "l1": (ENCODERS, 'AtPositions({}(rank=2), last=1).at("block[1:]:out")'),
    }.items()
}


def read(model: nn.Module, folder: Path) -> dt.Weights:
    """Read a folder whose name ends with where it acts."""
    return read_pyreft(model, folder, positions=folder.name.rpartition("-")[2].removeprefix("tied+"))


def test_deltatune_and_the_library_compute_the_same_of_each_other_s_folders(tmp_path):
    assert_same(exchange("pyreft", tmp_path, KINDS, write_pyreft, read))
