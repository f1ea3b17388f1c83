"""Folders of the library `adapters`, as it wrote them: read as the same function, and written as it reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltatune as dt
from deltatune.formats.adapterhub import read_adapterhub
from tests.formats.small import BUILDS, scores

FOLDERS = sorted((Path(__file__).parent / "data" / "adapterhub").iterdir())


def build_of(folder: Path) -> Any:
    return BUILDS[folder.name.partition("-")[0]]


@torch.no_grad()
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_of_the_library_computes_what_it_did_there(folder):
    build = build_of(folder)
    model, theirs = build(), load_file(folder / "scores.safetensors")["scores"]
    assert (scores(model) - theirs).abs().max() > 1e-2
    with dt.attach(model, read_adapterhub(build(), folder)):
        torch.testing.assert_close(scores(model), theirs, rtol=0, atol=1e-5)
