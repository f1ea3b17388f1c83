"""Every format under one roof: known by name, written by name, read by what a path holds."""

from __future__ import annotations

import pytest

import deltatune as dt
from deltatune import formats
from tests import tiny
from tests.formats.folders import assert_equal
from tests.laws.cases import busy


@pytest.mark.parametrize("name", ["deltatune", "peft"])
def test_what_is_written_by_name_is_read_by_what_the_folder_holds(name, tmp_path):
    model = tiny.llama()
    weights = busy(dt.init(dt.LoRA(rank=3, alpha=5).at("path:model.layers.*.self_attn.q_proj"), model))
    formats.write(name, model, weights, tmp_path / name)
    assert_equal(formats.read(model, tmp_path / name), weights)
    assert formats.known()[name]


def test_a_format_that_is_not_known_is_an_error_with_the_nearest(tmp_path):
    model = tiny.llama()
    with pytest.raises(dt.DeltaTuneError, match=r"no format 'pefd'\. Did you mean 'peft'.*Known are deltatune, .*peft"):
        formats.write("pefd", model, dt.init(dt.LoRA(), model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_no_format_is_an_error(tmp_path):
    with pytest.raises(dt.DeltaTuneError, match="no file .*delta.safetensors"):
        formats.read(tiny.llama(), tmp_path)
