"""Folders that older versions of peft wrote: read as the function that they had there, or refused by what tells them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deltatune as dt
from deltatune.formats.peft import read_peft
from tests.formats.small import BUILDS, scores

FOLDERS = sorted((Path(__file__).parent / "data" / "peft").iterdir())
REFUSED = {
    "0.15.2-llama-oft": "has oft_r, oft_s, the OFT of peft 0.15 and older",
    "0.17.1-square-lora": "are square, and .* does not say which peft wrote it",
}


@torch.no_grad()
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_of_an_older_peft_computes_what_it_did_there(folder):
    model = BUILDS[folder.name.split("-")[1]]()
    if folder.name in REFUSED:
        with pytest.raises(dt.DeltaTuneError, match=REFUSED[folder.name]):
            read_peft(model, folder)
        return
    theirs = load_file(folder / "scores.safetensors")["scores"]
    assert (scores(model) - theirs).abs().max() > 1e-2
    with dt.load(model, folder):
        torch.testing.assert_close(scores(model), theirs, rtol=0, atol=1e-5)
