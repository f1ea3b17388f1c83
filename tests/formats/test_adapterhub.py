"""Folders of the library `adapters`, as it wrote them: read as the same function, and written as it reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltatune as dt
from deltatune.formats.adapterhub import read_adapterhub, write_adapterhub
from tests.formats.folders import assert_equal
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


# What the library draws, trains or counts and a file of ours does not say, and what it writes more than once.
UNSAID = {
    "init_weights",
    "stochastic_depth",
    "dropout",
    "inv_adapter_reduction_factor",
    "reduction_factor",
    "bottleneck_size",
}
FOLDED = {"bert-plus": {"scaling"}, "bert-compacter": {"phm_layer"}, "t5-pfeiffer": set()}


def keys(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a folder's tensors by key, without the copies of prefixes in every layer."""
    found = load_file(folder / "adapter.safetensors")
    return {key: tuple(tensor.shape) for key, tensor in found.items() if ".pool." not in key}


def header(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_written_again_has_the_library_s_keys_shapes_and_config(folder, tmp_path):
    build = build_of(folder)
    weights = read_adapterhub(build(), folder)
    write_adapterhub(build(), weights, tmp_path, name="foo")
    assert_equal(read_adapterhub(build(), tmp_path), weights, exact=False)
    if folder.name == "bert-compacter":  # whose activation is not Compacter's here: multiplied out into an adapter
        return
    shapes = {key: shape for key, shape in keys(folder).items() if not key.endswith(".scaling")}
    assert keys(tmp_path) == shapes
    ours, theirs = header(tmp_path), header(folder)
    assert {key: ours[key] for key in ours if key != "config"} == {
        key: theirs[key] for key in theirs if key != "config"
    }
    if "configs" not in theirs["config"] and "invertible" not in folder.name:
        said = set(theirs["config"]) - UNSAID - ({"scaling"} if folder.name == "bert-plus" else set())
        assert {key: ours["config"].get(key) for key in said} == {key: theirs["config"][key] for key in said}
